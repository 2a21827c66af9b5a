"""The serving benchmark: its client, clock, gate and arithmetic; a small run with our own server, over real sockets."""

import asyncio
import base64
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from distillers.benchmarks.serving.load import (
    Broken,
    Exchange,
    Gate,
    arrivals,
    closed_loop,
    first_of_list,
    open_loop,
    parse,
    rate,
    recovery,
    summarise,
)
from distillers.benchmarks.serving.measure import abba, measure, memory_trend, quartiles
from distillers.benchmarks.serving.plan import SYSTEMS, Plan, find_systems, workload
from distillers.benchmarks.serving.servers import Unavailable, cpu_seconds, install, request, rss_mb, tree
from distillers.benchmarks.serving.tables import COLOURS, plot, soak_table, table
from distillers.cli import app
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.teacher import Teacher
from distillers.weights.manifest import Info

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are pinned, paused and read in /proc")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"POST /draw HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


def picture(level: int = 0) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(target, "PNG")
    return target.getvalue()


def gate(*levels: int, tolerance: int = 1, **more: Any) -> Gate:
    return Gate(np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels]), tolerance, **more)


def answer(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), more) + body


@asynccontextmanager
async def serving(handler: Handler) -> Any:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def answering(reply: Callable[[int], bytes], counts: dict[str, int], delay: float = 0.0) -> Handler:
    """Answers request i with reply(i), keeps the connection, and counts both."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counts["connections"] = counts.get("connections", 0) + 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(delay)
                counts["requests"] = counts.get("requests", 0) + 1
                writer.write(reply(counts["requests"]))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    return handle


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


# --- the client


@pytest.mark.parametrize("cut", range(1, 70, 3))
def test_an_answer_in_pieces_is_whole_only_at_its_end(cut: int) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n"
    assert parse(bytearray(chunked)) == (200, b"abcde", True)
    assert parse(bytearray(chunked[:-cut])) is None
    plain = answer(b"x" * 40, b"503 Busy", b"Connection: close\r\n")
    assert parse(bytearray(plain)) == (503, b"x" * 40, False)
    assert parse(bytearray(plain[:-cut])) is None


def test_what_is_no_answer_is_broken() -> None:
    with pytest.raises(Broken, match="no HTTP"):
        parse(bytearray(b"hello\r\n\r\n"))
    with pytest.raises(Broken, match="without a length"):
        parse(bytearray(b"HTTP/1.1 200 OK\r\n\r\nabc"))


def test_closed_loop_keeps_its_connections_and_counts_only_its_seconds() -> None:
    async def go() -> tuple[dict[str, Any], dict[str, int]]:
        counts: dict[str, int] = {}
        async with serving(answering(lambda _: answer(picture()), counts, delay=0.01)) as port:
            asked, start = await closed_loop(port, [REQUEST], callers=4, seconds=0.5, warm_s=0.2)
            return summarise(asked, 0.5, gate(0), start), counts

    found, counts = run(go())
    assert counts["connections"] == 4
    assert found["served"] == counts["requests"] > found["asked"]  # warm-up and tail are served, not counted
    assert 0 < found["images_per_second"] < 400 and found["latency_ms"]["p50"] >= 10  # 4 callers, 10 ms and more each
    assert found["images_per_second"] * found["latency_ms"]["p50"] / 1000 == pytest.approx(4, rel=0.6)
    assert (found["failed"], found["wrong"], found["max_difference"]) == ({}, 0, 0)


def test_a_rate_is_that_of_whole_batches_wherever_the_clock_starts_and_ends() -> None:
    batches = [0.3 * turn + 0.001 * i for turn in range(12) for i in range(16)]
    seen = {len([at for at in batches if start <= at <= start + 0.5]) / 0.5 for start in np.arange(0.32, 2, 0.05)}
    assert min(seen) < 33 and max(seen) > 63  # what counting gives
    for start in np.arange(0.32, 2, 0.05):
        assert rate(batches, start, start + 0.5) == pytest.approx(16 / 0.3, rel=1e-9)
    steady = list(np.arange(0, 3, 0.01))
    assert rate(steady, 1, 2) == pytest.approx(100, rel=0.03)
    assert rate(steady[:150], 1, 2) == pytest.approx(50, rel=0.03)  # silent from the middle on
    assert rate(steady[:50], 1, 2) == rate([], 1, 2) == rate(steady, math.inf, math.inf) == 0


def test_a_refusal_is_no_image_and_a_server_that_hangs_up_is_asked_again() -> None:
    counts: dict[str, int] = {}

    def reply(number: int) -> bytes:
        if number % 3 == 0:
            return answer(b"busy", b"503 Busy")
        return answer(picture(), more=b"Connection: close\r\n" if number % 3 == 1 else b"")

    async def go() -> Any:
        async with serving(answering(reply, counts)) as port:
            return await closed_loop(port, [REQUEST], callers=1, seconds=0.2, warm_s=0)

    asked, start = run(go())
    found = summarise(asked, 0.2, gate(0), start)
    assert found["failed"].keys() == {"503"} and counts["connections"] > 3
    assert found["images_per_second"] == pytest.approx(
        (found["asked"] - found["failed"]["503"]) / 0.2, rel=0.4
    )  # half as many again with them
    nobody = summarise(run(closed_loop(1, [REQUEST], callers=1, seconds=0.1, warm_s=0))[0], 0.1, gate(0))
    assert nobody["failed"]["none"] > 0 and nobody["images_per_second"] == 0 and nobody["served"] == 0


def test_latency_counts_from_the_intended_time_when_the_server_stalls() -> None:
    """One stall of 0.4 s under 100 requests a second: all that were meant for it have waited, not the one alone."""
    turn, end = asyncio.Lock, 0.0

    async def go() -> list[Exchange]:
        lock, begun = turn(), time.perf_counter()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal end
            try:
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    async with lock:  # one at a time, as a device
                        since = time.perf_counter() - begun
                        if 0.2 < since < 0.6:
                            await asyncio.sleep(0.6 - since)
                            end = time.perf_counter()
                    writer.write(answer(picture()))
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        async with serving(handle) as port:
            begun = time.perf_counter()
            return await open_loop(port, [REQUEST], np.arange(0, 1, 0.01))

    asked = run(go())
    intended, sent, done = np.array([(one.intended, one.sent, one.done) for one in asked]).T
    assert all(one.status == 200 for one in asked)
    np.testing.assert_allclose(intended - intended[0], np.arange(0, 1, 0.01), atol=1e-6)  # whatever the server does
    assert (done - intended > 0.1).sum() >= 25  # a closed loop would have seen one
    assert (done - intended).max() > 0.35
    assert ((sent < end) & (done >= end)).sum() >= 25  # the client itself did not wait for the server


def test_who_gets_no_answer_has_waited_until_the_end() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def go() -> list[Exchange]:
        async with serving(silent) as port:
            return await open_loop(port, [REQUEST], [0.0, 0.05], patience_s=0.2)

    asked = run(go())
    assert all(np.isnan(one.done) for one in asked)
    found = summarise(asked, 0.1, gate(0))
    assert found["failed"] == {"none": 2} and found["images_per_second"] == 0
    asked.append(Exchange(0, asked[0].intended, asked[0].intended, asked[0].intended + 0.3, 200, picture()))
    assert summarise(asked, 0.1, gate(0))["latency_ms"]["p50"] == pytest.approx(300, abs=1)


def test_arrivals_are_poisson_of_each_phase_and_repeatable() -> None:
    times = arrivals([(1000, 2), (200, 5)], seed=3)
    assert np.array_equal(times, arrivals([(1000, 2), (200, 5)], seed=3))
    assert not np.array_equal(times[:100], arrivals([(1000, 2), (200, 5)], seed=4)[:100])
    first, second = times[times < 2], times[times >= 2]
    assert len(first) == pytest.approx(2000, abs=150) and len(second) == pytest.approx(1000, abs=110)
    assert (np.diff(times) >= 0).all() and times[-1] < 7
    assert np.std(np.diff(first)) == pytest.approx(1e-3, rel=0.15)  # of an exponential distribution: its mean


# --- the gate


def test_the_gate_catches_a_wrong_picture_and_voids_the_system() -> None:
    seen = gate(10, 20, tolerance=1)
    assert [seen.difference(0, picture(level)) for level in (10, 11, 13)] == [0, 1, 3]
    assert seen.difference(1, picture(10)) == 10  # right picture, wrong seed
    assert seen.difference(0, b"no picture") == 256
    wide = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), 10, np.uint8)).save(wide, "PNG")
    assert seen.difference(0, wide.getvalue()) == 256
    asked = [Exchange(i % 2, 0.0, 0.0, 1.0, 200, picture((10, 20)[i % 2])) for i in range(8)]
    asked.append(Exchange(0, 0.0, 0.0, 1.0, 200, picture(20)))
    found = summarise(asked, 2.0, seen)
    assert (found["wrong"], found["max_difference"], found["images_per_second"]) == (1, 10, 4.0)
    listed = gate(10, unwrap=first_of_list)
    assert listed.difference(0, json.dumps([base64.b64encode(picture(10)).decode()]).encode()) == 0
    assert listed.difference(0, b"{}") == 256


# --- arithmetic


def test_abba_and_quartiles() -> None:
    assert abba(["raw", "a", "b"], 3) == [["raw", "a", "b"], ["b", "a", "raw"], ["raw", "a", "b"]]
    assert quartiles([4.0, 1.0, None, 2.0, 3.0]) == {
        "median": 2.5,
        "q1": 1.75,
        "q3": 3.25,
        "values": [4.0, 1.0, 2.0, 3.0],
    }
    assert quartiles([None]) is None


def test_recovery_is_the_time_until_latency_is_back_for_good() -> None:
    def waits(at: float) -> float:
        return 0.01 if at < 1 or at >= 3.78 else 0.5

    def at(moment: float, status: int = 200) -> Exchange:
        return Exchange(0, moment, moment, moment + waits(moment), status)

    asked = [at(k / 100) for k in range(600)]
    assert recovery(asked, 1, 3) == pytest.approx(0.8)  # the tenth in which it came back is not a good one yet
    assert recovery([at(k / 100) for k in range(360)], 1, 3) is None
    assert recovery([at(k / 100, 503 if k > 590 else 200) for k in range(600)], 1, 3) is None
    assert recovery([Exchange(0, k / 100, k / 100, k / 100 + 0.01, 200) for k in range(600)], 1, 3) == 0.0


@pytest.mark.parametrize(("per_second", "flat"), [(0.0, True), (0.05, False)])
def test_memory_is_flat_or_not_after_its_first_half(per_second: float, flat: bool) -> None:
    rng = np.random.default_rng(0)
    start = [(float(k), 300 + min(k, 200) / 2) for k in range(300)]  # filling caches is no leak
    rest = [(float(k), 400 + per_second * (k - 300) + rng.normal(0, 0.2)) for k in range(300, 900)]
    found = memory_trend(start + rest)
    assert found["flat"] is flat
    assert found["mb_per_hour"] == pytest.approx(3600 * per_second, abs=8)


# --- systems


def test_the_same_order_reaches_every_system_in_its_own_form(tmp_path: Path) -> None:
    folder = publish(tmp_path, "sar", "sar-to-optical", sar={"channels": 1, "range": [-1, 1]})
    (folder / "examples").mkdir()
    (folder / "examples" / "0.png").write_bytes(picture(7))
    work = workload(folder)
    for system in SYSTEMS:
        head, _, body = request(system, work, work.orders[5]).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        if system.takes == "bytes":
            assert body == picture(7) and b"seed=5" in head
        else:
            told = json.loads(body)
            told = told["orders"][0] if system.answer == "list" else told
            assert told["seed"] == 5 and base64.b64decode(told["image"]) == picture(7)
    assert b"POST /v1/images/translations?seed=5&model=sar&steps=1 " in request(SYSTEMS[0], work, work.orders[5])


@pytest.mark.process
def test_a_peer_that_cannot_be_installed_is_named_with_pips_words(tmp_path: Path) -> None:
    system = find_systems(["litserve"])[0]
    broken = type(system)(name="x", title="X", command=("lit.py",), environment="x", packages=("./not-there.whl",))
    with pytest.raises(Unavailable, match=r"cannot be installed: .*not-there"):
        install(broken, tmp_path)
    assert not (tmp_path / "x" / "installed.json").exists()


@pytest.mark.process
@linux
def test_a_tree_is_measured_whole() -> None:
    child = "import time\nwhile time.process_time() < 0.5: pass\nblock = b'x' * 60_000_000; time.sleep(30)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            while rss_mb(parent.pid) < 60:
                time.sleep(0.1)
            assert len(tree(parent.pid)) == 2 and rss_mb(parent.pid) > 60
            assert 0.2 < cpu_seconds(parent.pid) < 5
        finally:
            for pid in reversed(tree(parent.pid)):
                os.kill(pid, 9)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rounds": 0}, "rounds"), ({"seconds": 0.0}, "seconds"), ({"callers": [0]}, "concurrency"),
        ({"loads": [0]}, "load"), ({"folders": []}, "folders"),
    ],
)  # fmt: skip
@linux
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput, match=field):
        next(measure(Plan(**{"folders": [Path("w")], "systems": SYSTEMS[:1], "pinned": False, **change})))


def test_an_unknown_system_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'apache'; allowed: fewstep-eager, fewstep, "):
        find_systems(["apache"])
    with pytest.raises(BadInput, match=r"fewstep\.json"):
        workload(tmp_path)


# --- the whole, small


def publish(root: Path, name: str, task: str, **more: Any) -> Path:
    torch.manual_seed(0)
    info = Info(
        name=name, task=task, data="shapes", size=(16, 16), teacher="t", method="consistency", role="student",
        sampler="consistency", step_times={1: [999.0]}, **more,
    )  # fmt: skip
    network = {
        "block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",), "norm_num_groups": 4, "add_attention": False,
    }  # fmt: skip
    codec = PixelUnshuffle(info.patch)
    teacher = Teacher.random(info, network, {"name": "vp"}, "eps", codec)
    Generator(teacher.denoiser, codec, info).save_pretrained(root / name)
    return root / name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("weights"), "tiny", "class-to-image", labels=["a", "b", "c"])


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One run of the command with our own server, as it draws without a choice of backends, on two workloads."""
    out = tmp_path_factory.mktemp("out") / "serving.json"
    command = ["benchmark", "serving", str(tiny), "--systems", "fewstep-eager", "--rounds", "2", "--unpinned"]
    command += ["--seconds", "0.1", "--concurrency", "1,4", "--load", "50", "--no-burst", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "| fewstep, eager |" in done.output
    yield out


@pytest.mark.process
@linux
def test_our_server_draws_what_the_raw_loop_draws_and_the_report_says_so(measured: Path) -> None:
    found = json.loads(measured.read_text())
    constant, tiny = found["workloads"]
    assert constant["constant"] and not constant["systems"]["fewstep-eager"]["open"]
    assert constant["systems"]["fewstep-eager"]["gate"]["max_difference"] == 0
    for name, figures in tiny["systems"].items():
        gate = figures["gate"]
        assert gate["wrong"] == 0 and gate["checked"] > 20 and gate["max_difference"] <= 2
        assert not any(point["failed"] for point in figures["closed"].values())
        # an open loop asks on where another test has the processor, and what does not fit is refused
        assert not any(point["failed"].keys() - {"503"} for point in figures["open"].values())
        assert len(figures["closed"]["1"]["images_per_second"]["values"]) == 2  # rounds
        assert 0 < figures["closed"]["4"]["images_per_second"]["median"] < 20_000
        assert figures["ready_s"] > 0 and figures["cpu_ms"]["median"] > 0 and figures["rss_mb"]["median"] > 100
        assert figures["backend"]["tuning"] is False, name
    assert tiny["systems"]["fewstep-eager"]["backend"]["name"] == "eager"
    assert all(len(tiny["raw"][kind]["best"]["values"]) == 2 for kind in ("forward", "encoded"))
    page = measured.with_suffix(".md").read_text()
    for text in ("### constant picture, 16x16", "### tiny, 16x16, steps: 1", "added ms", "at 50 %", "ABBA"):
        assert text in page
    again = page.split("Measured by `fewstep ")[1].split("`")[0].replace("weights/tiny", str(measured.parent)).split()
    refused = CliRunner().invoke(app, [*again, "--rounds", "0"])  # every word is one that the command knows
    assert isinstance(refused.exception, BadInput) and "rounds" in str(refused.exception), refused.output
    with Image.open(measured.with_suffix(".png")) as image:
        assert image.width > 700


@pytest.mark.process
@linux
def test_a_wrong_picture_and_a_missing_peer_stand_in_the_report(measured: Path, tmp_path: Path) -> None:
    found = json.loads(
        measured.read_text(), object_hook=lambda o: {int(k) if k.isdigit() else k: v for k, v in o.items()}
    )
    systems = found["workloads"][1]["systems"]
    systems["fewstep-eager"]["gate"] |= {"wrong": 3, "max_difference": 91}
    found["peers"]["ray"], systems["ray"] = {"title": "Ray"}, {"not_measured": "cannot be installed: no network"}
    page = table(found)
    assert "* fewstep, eager: **void**: 3 of " in page and "up to 91 levels" in page
    assert "* Ray: not measured: cannot be installed: no network" in page
    assert page.count("| fewstep, eager |") == 1  # of the constant picture alone
    plot(found, tmp_path / "still.png")


def test_every_system_has_a_colour_of_its_own_and_one_more_is_drawn_too(tmp_path: Path) -> None:
    assert len(set(COLOURS)) == len(COLOURS) >= len(SYSTEMS)
    names = [str(i) for i in range(len(COLOURS) + 1)]
    rates = {1: {"images_per_second": {"median": 5.0}}, 4: {"images_per_second": {"median": 9.0}}}
    one = {"name": "a", "constant": True, "systems": {name: {"closed": rates, "gate": {"wrong": 0}} for name in names}}
    plot({"workloads": [one], "peers": {name: {"title": name} for name in names}}, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000


@pytest.mark.process
@linux
def test_a_soak_reports_every_minute(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = ["benchmark", "soak", str(tiny), "--system", "fewstep-eager", "--minutes", "0.1", "--load", "20"]
    command += ["--unpinned", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    found = json.loads(out.read_text())
    assert found["alive"] and found["minutes"][0]["served"] > 10 and not found["minutes"][0]["wrong"], done.output
    assert found["memory"]["start_mb"] > 100 and found["rate"] == pytest.approx(0.2 * found["capacity"])
    assert "| minute | images/s |" in out.with_suffix(".md").read_text()
    assert done.exit_code == (0 if found["memory"]["flat"] else 1)
    found["memory"]["flat"] = False
    assert "Memory is **not flat**" in soak_table(found)
