"""Every module imports by itself, and none answers to a name that it no longer has."""

import importlib
import pkgutil

import pytest

import app
import distillers

MODULES = [
    module.name
    for package in (distillers, app)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if ".peers." not in module.name and not module.name.endswith(".__main__")  # which are run, not imported
]
MOVED = {
    "distillers": "adapter calibration codec compare conditions cost demonstration denoiser discriminator distiller "
    "evaluate execution features golden job latents load losses options pictures process prompts publish radiometry "
    "raster recipe reward scene schedule serving servers standings suggest throughput toy trainer watch",
    "app": "access drain images limits logs metrics png rasters tracing visits routes.answers",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", [f"{package}.{name}" for package, names in MOVED.items() for name in names.split()])
def test_a_name_of_before_is_gone(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
