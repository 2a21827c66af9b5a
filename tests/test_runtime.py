"""The description of the process's hardware and packages."""

import os
from importlib.metadata import version

import torch

from distillers.runtime import device_name, package_versions


def test_the_name_of_a_processor_says_its_type_and_its_cores() -> None:
    assert device_name("cpu") == device_name(torch.device("cpu")) == device_name("cpu:0")
    assert device_name("cpu").startswith("cpu (") and device_name("cpu").endswith(f", {os.cpu_count()} cores)")


def test_versions_are_of_the_installed_packages_alone() -> None:
    assert package_versions("torch", "no-such-package", "numpy") == {name: version(name) for name in ("torch", "numpy")}
