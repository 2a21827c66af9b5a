"""The way in: metadata, the container files, make, and the tree's size."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import distillers

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
FEWSTEP = [sys.executable, "-c", "import sys; from distillers.cli import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "MAKEFLAGS": ""}


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in the project's root (or `cwd`), output captured as text."""
    options = {"cwd": ROOT, "env": ENVIRONMENT, "timeout": 120, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def tracked() -> list[Path]:
    """What git tracks or would track on the next `git add .`."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: what is tracked cannot be listed")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    assert listed.returncode == 0, listed.stderr
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, argument) pairs, comments dropped, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def exec_form(instruction: str) -> list[list[str]]:
    """The commands that an instruction (CMD, ENTRYPOINT, HEALTHCHECK) holds as JSON lists, in order."""
    return [json.loads(rest[rest.index("[") :]) for word, rest in dockerfile() if word == instruction]


# What pip is told


def test_every_third_party_import_is_declared() -> None:
    optional = PROJECT["optional-dependencies"]
    listed = PROJECT["dependencies"] + [line for extra, lines in optional.items() if extra != "dev" for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in listed}
    distributions = packages_distributions()
    files = {*ROOT.glob("distillers/**/*.py"), *ROOT.glob("app/**/*.py")} - {
        *ROOT.glob("distillers/benchmarks/serving/peers/*.py")
    }
    for file in files:  # peers have environments of their own
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"distillers", "app"}:
            providers = {canonicalize_name(found) for found in distributions.get(name, [name])}
            assert providers & declared, (
                f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml does not ask for"
            )


def test_a_default_install_needs_no_torchvision() -> None:
    assert "torchvision" not in {Requirement(line).name for line in PROJECT["dependencies"]}


def test_constraints_are_exact_and_inside_the_declared_ranges() -> None:
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for line in pins:
        name, version = line.split("==")
        assert canonicalize_name(name) not in ranges or ranges[canonicalize_name(name)].contains(version), line


@pytest.mark.process
def test_the_image_installs_a_package_that_is_whole(tmp_path: Path) -> None:
    """The Dockerfile's own pip command, on what it copies, less the dependencies; the result is imported elsewhere."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("distillers", "app"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (command,) = re.findall(r"pip install .*", "\n".join(rest for word, rest in dockerfile() if word == "RUN"))
    pip = [sys.executable, "-m", *shlex.split(command.replace("${PIP_EXTRA_ARGS}", ""))]
    done = run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target)], cwd=source)
    assert done.returncode == 0, done.stderr

    def files(root: Path, pattern: str) -> set[Path]:
        return {file.relative_to(root) for file in root.glob(pattern) if file.is_file()}

    for pattern in ("distillers/**/*.py", "distillers/recipes/*.toml", "app/**/*.py", "app/static/**/*"):
        assert files(target, pattern) == files(ROOT, pattern), pattern
    assert files(target, "distillers/recipes/*.toml")
    script = (next(target.glob("fewstep-*.dist-info")) / "entry_points.txt").read_text()
    assert "fewstep = distillers.cli:main" in script
    loaded = run(
        [sys.executable, "-c", "import distillers.cli as cli; print(callable(cli.main), cli.__file__)"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(target)},
    )
    assert loaded.stdout.split() == ["True", str(target / "distillers" / "cli" / "__init__.py")], loaded.stderr


# What the repository carries


def test_the_tree_stays_small_and_holds_nothing_that_executes_on_load() -> None:
    limits, size = PYPROJECT["tool"]["fewstep"]["limits"], {file: file.stat().st_size for file in tracked()}
    weights = {file: n for file, n in size.items() if file.is_relative_to(ROOT / "weights")}
    folders = Counter[str]()
    for file, n in weights.items():
        folders[file.relative_to(ROOT / "weights").parts[0]] += n
    assert sum(size.values()) < limits["tree"] * 1e6
    assert sum(weights.values()) < limits["weights"] * 1e6
    assert not {name: n for name, n in folders.items() if n >= limits["folder"] * 1e6}
    assert not [file for file in size if file.suffix in {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}]


def test_the_citation_is_of_this_version() -> None:
    """Its keys are those of the Citation File Format 1.2.0 that this file needs."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the format requires
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert all(person.get("name") or person.get("family-names") for person in cited["authors"])
    assert cited["version"] == distillers.__version__ == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]


# Make, CI and containers


def test_make_run_installs_no_development_tools() -> None:
    planned = run(["make", "-n", "-W", "pyproject.toml", "run"]).stdout
    assert "[dev]" not in planned and "bin/fewstep run" in planned


def test_make_says_what_is_missing_and_leaves_no_half_environment(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = run(["make", ".venv/bin/python", "PYTHON=false"], cwd=tmp_path)
    assert done.returncode == 2 and "python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_compose_and_dockerfile_agree() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    app, distill = compose["services"]["app"], compose["services"]["distill"]
    stages = [rest.split(" AS ")[1] for word, rest in dockerfile() if word == "FROM"]
    arguments = {rest.partition("=")[0] for word, rest in dockerfile() if word == "ARG"}
    assert stages[-1] == app["build"]["target"] == "serve" and distill["build"]["target"] in stages
    assert set(app["build"]["args"]) == set(distill["build"]["args"]) <= arguments
    assert "profiles" not in app and distill["profiles"] == ["jobs"]
    assert app["ports"] == ["127.0.0.1:8000:8000"]
    (volume,) = app["volumes"]
    assert distill["volumes"] == [volume] and volume.split(":")[0] in compose["volumes"]
    assert ("VOLUME", volume.split(":")[1]) in dockerfile()


def test_the_image_gets_every_file_it_copies_and_no_root() -> None:
    kept = set(re.findall(r"(?m)^!(.*)", (ROOT / ".dockerignore").read_text()))
    copied = {name for word, rest in dockerfile() if word == "COPY" for name in rest.split()[:-1] if name[:2] != "--"}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    instructions = [word for word, _ in dockerfile()]
    assert instructions.index("USER") > max(i for i, word in enumerate(instructions) if word == "RUN")


@pytest.mark.process
def test_the_distill_image_starts_with_help() -> None:
    (entrypoint,), command = exec_form("ENTRYPOINT"), exec_form("CMD")[0]
    assert entrypoint[0] == "fewstep"
    done = run([*FEWSTEP, *entrypoint[1:], *command])
    assert done.returncode == 0 and "RECIPE" in done.stdout.upper()
