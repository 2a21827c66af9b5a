"""Write the figures of the serving benchmark as tables in Markdown and as one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from distillers.benchmarks.serving.measure import BURST, BURST_LOAD, LEAVE, LONGEST, PICTURES
from distillers.evaluation.report import markdown_table

Row = tuple[str, Mapping[str, Any]]  # a system's title and its figures
COLOURS = ("#d62728", "#ff7f0e", "#1f77b4", "#17becf", "#2ca02c", "#98df8a", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def table(found: Mapping[str, Any]) -> str:
    """Write for each workload the raw loop, the closed loop and the open loop; then how it was measured."""
    parts = [_workload(found, one) for one in found["workloads"]]
    return "\n\n".join([*parts, _setting(found), f"Measured by `{command(found)}`."]) + "\n"


def command(found: Mapping[str, Any]) -> str:
    """Write the command that measures the same again."""
    plan = found["plan"]
    words = ["fewstep benchmark serving", *(f"weights/{name}" for name in plan["folders"])]
    lists = {"systems": found["peers"], "concurrency": plan["callers"], "load": plan["loads"]}
    words += [f"--{name} {','.join(map(str, values))}" for name, values in lists.items()]
    words += [f"--{name} {plan[name]}" for name in ("rounds", "seconds", "device", "dtype", "batch")]
    words += [f"--no-{name}" for name in ("constant", "burst") if not plan[name]]
    return " ".join(words if plan["pinned"] else [*words, "--unpinned"])


def _workload(found: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Write the tables of one workload."""
    forward, encoded = one["raw"]["forward"], one["raw"]["encoded"]
    first = f"{forward['batches'][1]['pass_ms']['median']:.2f}"
    both = encoded["batches"][1]["pass_ms"]["median"]
    lines = [
        f"### {one['name']}"
        + ("" if one["constant"] else f", {one['size'][1]}x{one['size'][0]}, steps: {one['steps']}"),
        "",
        f"No server: encoding alone {_figure(encoded['best'])} images/s (one picture: {both:.3f} ms)."
        if one["constant"]
        else f"No server: forward pass {_figure(forward['best'])} images/s in batches of {forward['best_batch']} "
        f"(one picture: {first} ms); with encoding {_figure(encoded['best'])} images/s in batches of "
        f"{encoded['best_batch']} (one picture: {both:.2f} ms).",
        "",
    ]
    rows = [(found["peers"][name]["title"], figures) for name, figures in one["systems"].items() if _counts(figures)]
    lines += [_closed(one, rows), ""] if rows else []
    lines += [_open(one, rows), ""] if rows and not one["constant"] and rows[0][1]["open"] else []
    for name, figures in one["systems"].items():
        title = found["peers"][name]["title"]
        if backend := figures.get("backend"):
            lines.append(
                f"* {title} ran {backend['name']}, {backend.get('threads', 1)} thread(s), "
                f"known {figures['tuned_s']:.0f} s after its start"
            )
        if "not_measured" in figures:
            lines.append(f"* {title}: not measured: {figures['not_measured']}")
        elif not _counts(figures):
            gate = figures["gate"]
            lines.append(
                f"* {title}: **void**: {gate['wrong']} of {gate['checked']} pictures were not those of the raw forward "
                f"pass (by up to {gate['max_difference']} levels of 255)"
            )
    return "\n".join(lines).rstrip()


def _counts(figures: Mapping[str, Any]) -> bool:
    """Say whether a system was measured and every picture was right."""
    return "not_measured" not in figures and not figures["gate"]["wrong"]


def _closed(one: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Write the table of the closed loops."""
    alone = one["raw"]["encoded"]["batches"][1]["pass_ms"]["median"]
    forward, encoded = (one["raw"][kind]["best"]["median"] for kind in ("forward", "encoded"))
    callers = list(rows[0][1]["closed"])

    def rate(count: int) -> Any:
        return (f"{count}", lambda row: _rate(row[1]["closed"][count]), "")

    def lone(row: Row) -> float:
        return float(row[1]["closed"][callers[0]]["latency_ms"]["p50"]["median"])

    columns: list[Any] = [("images/s at so many callers", lambda row: row[0], ""), *map(rate, callers)]
    columns += [("best", lambda row: _figure(row[1]["best"]), "")]
    if callers[0] == 1:
        columns += [
            ("one caller, p50 ms", lambda row: _figure(row[1]["closed"][1]["latency_ms"]["p50"], 2), ""),
            ("added ms", lambda row: lone(row) - alone, ".2f"),
        ]
    if not one["constant"]:
        columns += [("best / forward", lambda row: row[1]["best"]["median"] / forward, ".3f")]
    columns += [
        ("best / with encoding", lambda row: row[1]["best"]["median"] / encoded, ".3f"),
        ("CPU ms/image", lambda row: row[1]["cpu_ms"]["median"], ".2f"),
        ("RSS MB", lambda row: row[1]["rss_mb"]["median"], ".0f"),
        ("first picture after s", lambda row: row[1]["ready_s"], ".1f"),
        ("bytes", lambda row: row[1]["bytes"], ""),
        ("pictures checked", lambda row: row[1]["gate"]["checked"], ""),
        ("off by at most", lambda row: row[1]["gate"]["max_difference"], ""),
    ]
    return markdown_table(columns, rows)


def _open(one: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Write the table of the open loops."""
    alone = one["raw"]["forward"]["batches"][1]["pass_ms"]["median"]

    def latency(load: int) -> Any:
        return (f"at {load} %", lambda row: _latency(row[1]["open"][load]), "")

    loads = list(rows[0][1]["open"])
    columns: list[Any] = [("p50 / p99 ms of an open loop", lambda row: row[0], ""), *map(latency, loads)]
    if 80 in loads:
        columns += [("p99 at 80 % / a pass of one", lambda row: _share(row[1]["open"][80], alone), ".1f")]
    if any(row[1]["burst"] for row in rows):
        columns += [("recovered from a burst after s", lambda row: _recovery(row[1]["burst"]), "")]
        columns += [(f"drawn for {LEAVE} who left", lambda row: row[1]["wasted"], ".0f")]
    return markdown_table(columns, rows)


def _rate(point: Mapping[str, Any]) -> str:
    """Write images a second, and the share that failed."""
    middle = point["images_per_second"]["median"]
    return f"{middle:.{0 if middle >= 100 else 1}f}{_failed(point)}"


def _latency(point: Mapping[str, Any]) -> str:
    """Write p50 / p99 in ms, and the share that failed."""
    p50, p99 = (point["latency_ms"].get(name) for name in ("p50", "p99"))
    return (f"{p50['median']:.1f} / {p99['median']:.1f}" if p50 and p99 else "-") + _failed(point)


def _failed(point: Mapping[str, Any]) -> str:
    """Write the share of requests that were refused or never answered; "" without one."""
    lost = sum(point["failed"].values())
    return f", {100 * lost / max(point['asked'], lost):.0f} % failed" if lost else ""


def _share(point: Mapping[str, Any], alone: float) -> float | None:
    """Divide the p99 latency by the ms of a forward pass of one picture."""
    p99 = point["latency_ms"].get("p99")
    return p99["median"] / alone if p99 else None


def _recovery(burst: Mapping[str, Any] | None) -> str:
    """Write the seconds of recovery from a burst, and the share that failed."""
    if burst is None:
        return "-"
    lost = _failed(burst)
    return (f"over {BURST[2]:.0f}" if burst["recovery_s"] is None else f"{burst['recovery_s']:.1f}") + lost


def _figure(figure: Mapping[str, Any], digits: int | None = None) -> str:
    """Write the median and, over more than one round, the quartiles."""
    if digits is None:
        digits = 0 if figure["median"] >= 100 else 1
    middle, low, high = (f"{figure[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return middle if len(figure["values"]) == 1 else f"{middle} ({low}-{high})"


def _setting(found: Mapping[str, Any]) -> str:
    """Write where and how the figures were measured, and what each column means."""
    s, plan = found["setting"], found["plan"]
    pinned = f"the servers on processor {s['servers_on'][0]}, the client on {s['client_on'][0]}"
    free = "servers and client on all processors"
    loads = ", ".join(
        f"{100 * load:.0f} % for {seconds:.0f} s" for load, seconds in zip(BURST_LOAD, BURST, strict=True)
    )
    peers = {name: version for peer in found["peers"].values() for name, version in peer.get("versions", {}).items()}
    where = (
        f"{s['device']}, {pinned if plan['pinned'] else free}; {s['date']}, Python {s['python']}, torch {s['torch']}"
    )
    lates = [
        point["sent_late_ms_p99"]["median"]
        for one in found["workloads"]
        for figures in one["systems"].values()
        for point in list(figures.get("open", {}).values())[:1]
    ]
    late = f" The client sent 99 % of its requests within {max(lates):.2f} ms of their time." if lates else ""
    named = "".join(f", {name} {version}" for name, version in peers.items())
    longest = LONGEST * plan["seconds"]
    return f"""{where}{named}; load average {s["load_average"]["before"]:.2f} before.
Rounds: {plan["rounds"]}, systems in ABBA order; medians, with quartiles behind them; {plan["seconds"]:g} to
{longest:g} s for each closed loop, as {PICTURES} pictures take, and twice that for each open one. Same weights, same
PNG codec unless it says otherwise, same OpenMP settings for all.{late}

* Images/s of a closed loop: over whole batches, from the last answer before its seconds to the last one in them.
* Added: over a forward pass and encoding of one picture without a server.
* Open loop: Poisson arrivals at a share of what forward pass and encoding give without a server; latency from the
  moment at which a request was meant to be sent. Failed: sent away, or without an answer 3 s after the end.
* Burst: {loads}; recovered when the median of a tenth of a second is
  at most twice the 90 % quantile from before, for good.
* Drawn for {LEAVE} who left: what callers who hang up after 20 ms have cost, in images' worth of processor time.
* CPU: of all processes of a server, per image. RSS: the same, shared pages counted for each that shares them.
* Every picture that came back was decoded and compared with the raw forward pass of its seed: at most 1 level of 255
  (torch sums in another order in another batch), 2 for fewstep as it comes, which may choose 16 bits."""


def soak_table(found: Mapping[str, Any]) -> str:
    """Write the verdict on a long run, then a line for each minute."""
    memory, s = found["memory"], found["setting"]
    verdict = "flat" if memory["flat"] else "**not flat**"
    checked, wrong = (sum(minute[name] for minute in found["minutes"]) for name in ("served", "wrong"))
    columns: list[Any] = [
        ("minute", lambda row: row[0] + 1, ""),
        ("images/s", lambda row: row[1]["images_per_second"], ".1f"),
        ("p50 ms", lambda row: row[1]["latency_ms"]["p50"], ".2f"),
        ("p99 ms", lambda row: row[1]["latency_ms"]["p99"], ".2f"),
        ("failed", lambda row: sum(row[1]["failed"].values()), ""),
        ("wrong", lambda row: row[1]["wrong"], ""),
    ]
    slope = f"a line of {memory['mb_per_hour']:+.1f} MB an hour ({memory['rise_mb']:+.2f} MB in all)"
    levels = f"{memory['start_mb']:.0f} MB at first, {memory['median_mb']:.0f} MB in the second half"
    load = f"{found['load']} % of {found['capacity']:.0f} images/s, minutes: {len(found['minutes'])}"
    again = ["fewstep benchmark soak", f"weights/{found['model']}", "--load", str(found["load"])]
    again += ["--minutes", f"{found['asked_minutes']:g}", *(() if found["pinned"] else ["--unpinned"])]
    return f"""{found["system"]}, {found["model"]} at {load}. Memory is {verdict}:
{levels}, {slope} through it.
{checked} pictures checked, {wrong} wrong{"" if found["alive"] else "; the server has ended"}.
{s["device"]}, torch {s["torch"]}, {s["date"]}.
Measured by `{" ".join(again)}`.

{markdown_table(columns, list(enumerate(found["minutes"])))}
"""


# --- the plot


def plot(found: Mapping[str, Any], path: Path, side: int = 330) -> None:
    """Draw images a second by callers as a PNG, a panel for each workload; a line shows the raw loop with encoding."""
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    margin, top, legend = 62, 44, 300
    panels = found["workloads"]
    sheet = Image.new("RGB", (len(panels) * (side + margin + 20) + legend, side + top + 60), "white")
    draw = ImageDraw.Draw(sheet)
    colour = dict(zip(found["peers"], cycle(COLOURS), strict=False))
    for i, one in enumerate(panels):
        left, bottom = i * (side + margin + 20) + margin, top + side
        shown = {name: figures["closed"] for name, figures in one["systems"].items() if _counts(figures)}
        counts = list(next(iter(shown.values()), {}))
        ceiling = 0 if one["constant"] else one["raw"]["encoded"]["best"]["median"]  # encoding alone is no ceiling
        rates = [point["images_per_second"]["median"] for closed in shown.values() for point in closed.values()]
        step = _step(max([ceiling, *rates, 1]) / 5)
        high = step * math.ceil(1.02 * max([ceiling, *rates, 1]) / step)
        across = {count: left + round(k * side / max(1, len(counts) - 1)) for k, count in enumerate(counts)}
        draw.text((left, 12), one["name"], fill="black", font=font)
        for k in range(round(high / step) + 1):
            at = bottom - round(k * step / high * side)
            draw.line((left, at, left + side, at), fill="#eeeeee")
            draw.text((left - 8, at), f"{k * step:g}", fill="black", font=small, anchor="rm")
        for count, at in across.items():
            draw.text((at, bottom + 6), str(count), fill="black", font=small, anchor="ma")
        draw.text((left + side // 2, bottom + 26), "callers", fill="black", font=small, anchor="ma")
        if ceiling:
            raw = bottom - round(ceiling / high * side)
            draw.line((left, raw, left + side, raw), fill="black", width=2)
        for name, closed in shown.items():
            points = [
                (across[count], bottom - round(point["images_per_second"]["median"] / high * side))
                for count, point in closed.items()
            ]
            draw.line(points, fill=colour[name], width=3 if name.startswith("fewstep") else 2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour[name])
    left = len(panels) * (side + margin + 20) + 10
    entries = [("no server: forward pass and encoding", "black")]
    entries += [(peer["title"], colour[name]) for name, peer in found["peers"].items()]
    for k, (title, ink) in enumerate(entries):
        draw.line((left, top + 8 + 22 * k, left + 22, top + 8 + 22 * k), fill=ink, width=3)
        draw.text((left + 30, top + 8 + 22 * k), title, fill="black", font=small, anchor="lm")
    draw.text((margin, 30), "images a second", fill="#666666", font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _step(rough: float) -> float:
    """Round up to the next of 1, 2, 5, 10, ... ."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
