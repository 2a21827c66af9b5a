"""Everything that README.md and docs/ tell the reader to do runs; what they and the cards point to exists."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from PIL import Image
from typer.testing import CliRunner

import distillers
from distillers import cli
from distillers.jobs.recipe import Recipe
from distillers.sar.demonstration import demonstration

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*/**/*.md")), *sorted(ROOT.glob("weights/*/README.md"))]
SCRIPTS = sorted((ROOT / "docs").glob("*.py"))
ADDRESS = "http://127.0.0.1:8000"
FEWSTEP = [sys.executable, "-m", "distillers.cli"]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "MAKEFLAGS": ""}


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=cwd)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return [text for kind, text in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text()) if kind == language]


def each_block(language: str) -> list[Any]:
    return [pytest.param(block, id=name(page)) for page in GUIDES for block in blocks(page, language)]


def commands(page: Path, program: str) -> list[str]:
    """A page's shell commands that start with `program`, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split(" ")[0].removeprefix(".venv/bin/") == program]


def each_command(program: str) -> list[Any]:
    return [pytest.param(line, id=f"{name(page)}: {line}") for page in GUIDES for line in commands(page, program)]


def described(text: str) -> list[str]:
    """The code spans and code blocks of a page."""
    return re.findall(r"`+([^`]+)`+", text)


# What is said can be done


@pytest.mark.parametrize("line", each_command("fewstep"))
def test_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    command = words[1:3] if words[1] == "benchmark" else words[1:2]
    done = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0, done.output
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", done.output))


def test_make_knows_every_target() -> None:
    said = {target for page in GUIDES for target in re.findall(r"(?m)(?:`|^)make (\w+)", page.read_text())}
    assert {"run", "test"} <= said
    done = run(["make", "-n", *sorted(said)])
    assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_start(script: Path) -> None:
    done = processes.run([sys.executable, str(script), "--help"], env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", each_block("toml"))
def test_recipes_are_accepted(block: str, tmp_path: Path) -> None:
    """With the overrides that the page's commands give them."""
    (tmp_path / "mine.toml").write_text(block)
    lines = [line for page in GUIDES if block in blocks(page, "toml") for line in commands(page, "fewstep")]
    overrides = [word for line in lines if " mine.toml " in line for word in line.split() if "=" in word]
    assert overrides
    assert Recipe.load(tmp_path / "mine.toml", overrides).name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image's own start command on a free port; its health check, run as written, says when it is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    *_, check, start = map(json.loads, re.findall(r"CMD (\[.*\])", (ROOT / "Dockerfile").read_text()))
    assert start[0] == "fewstep" and check[0] == "python" and ADDRESS in check[-1]
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with log.open("w") as out:
        command = [*FEWSTEP, *start[1:], "--port", port]
        untuned = ENVIRONMENT | {"FEWSTEP_TUNE_SECONDS": "0"}  # which would take as long as all requests
        server = processes.Popen(command, cwd=ROOT, env=untuned, stdout=out, stderr=out)
    try:
        alive = [sys.executable, *check[1:-1], check[-1].replace(":8000", f":{port}")]
        deadline = time.monotonic() + 300
        while run(alive).returncode:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        while (status := readiness(f"http://127.0.0.1:{port}/readyz")) == "opening":
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert status == "ready", f"the models of weights/ are not served: {status}"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def readiness(url: str) -> str:
    """What /readyz says: opening, ready, or empty."""
    try:
        return str(json.load(urllib.request.urlopen(url, timeout=30))["status"])
    except urllib.error.HTTPError as error:
        return str(json.load(error)["status"])


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("command", each_command("curl"))
def test_requests(served: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    if "@scene.tif" in command:
        demonstration(tmp_path / "scene.tif", side=128)
    if "@forest.png" in command:  # drawn by the command before
        Image.new("RGB", (64, 64), (40, 90, 40)).save(tmp_path / "forest.png")
    done = run([*shlex.split(command.replace(ADDRESS, served)), "--fail-with-body"], cwd=tmp_path)
    answer = done.stdout.encode() + b"".join(file.read_bytes() for file in tmp_path.glob("optical.*"))
    drawn = [file for file in tmp_path.glob("*.png") if file.stem != "optical" and f"@{file.name}" not in command]
    answer += b"".join(file.read_bytes() for file in drawn)
    assert done.returncode == 0, answer[:1000].decode(errors="replace")
    starts = {"Accept: image/png": b"\x89PNG", "Accept: image/tiff": b"II", "/metrics": b"# HELP"}
    assert answer.startswith(next((start for kind, start in starts.items() if kind in command), b"{"))


@pytest.mark.process
@pytest.mark.parametrize("block", each_block("python"))
def test_python(served: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    done = processes.run([sys.executable, "-c", block.replace(ADDRESS, served)], env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


# What is pointed to is there


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert heading[1:] in {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    spans = " ".join(described(page.read_text()))
    for file in re.findall(r"(?<![\w/.-])(?:distillers|app|tests|docs)/[\w/-]+(?:\.\w+)?", spans):
        assert "NAME" in file or (ROOT / file).exists(), file
    for dotted in re.findall(r"(?<![\w/.-])(?:distillers|app)(?:\.\w+)+", spans):
        place, parts = ROOT, dotted.split(".")
        while parts and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").is_file()):
            place /= parts.pop(0)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert all(part in file.read_text() for part in parts), dotted


def test_the_readme_is_short_and_its_figures_are_the_reports() -> None:
    """Each row of its table compares the student at one step with the teacher beside it in the folder's report."""
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) <= 8000
    rows = re.findall(r"(?m)^\|.*\]\((weights/[\w-]+)\) \|(.*)\|$", readme.read_text())
    assert rows
    for folder, text in rows:
        report = {row["name"]: row for row in json.loads((ROOT / folder / "report.json").read_text())["rows"]}
        steps = int(re.findall(r"teacher at (\d+) steps", text)[0])
        pair = [report["student, 1 step"], report[f"teacher, {steps} steps"]]
        ms = [row["latency_ms"]["p50"] for row in pair]
        if "prompts" in text:
            quality = [100 * row["adherence"]["all"]["followed"] for row in pair]
        else:
            quality = [100 * row["shows"]["asked"] if "%" in text else row["frechet"] for row in pair]
        said = [float(number) for number in re.findall(r"\d+\.\d", text)]
        assert said == [round(figure, 1) for figure in (*quality, *ms, ms[1] / ms[0])], folder


def test_the_guides_import_the_public_face() -> None:
    said = [names for page in GUIDES for names in re.findall(r"(?m)^from distillers import (.+)$", page.read_text())]
    assert said and {name for names in said for name in names.split(", ")} <= set(distillers.__all__)
