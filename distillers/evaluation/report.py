"""The report of an evaluation: its rows, and the same as Markdown tables."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from distillers.runtime import device_name

R = TypeVar("R")

Column = tuple[str, Callable[[R], Any], str]  # of a table: its head, the value of a row, how that is formatted


# --- the report


@dataclass(kw_only=True)
class Row:
    """One contestant. None: does not apply. Distances are to the reference; `agreement` is with the teacher."""

    name: str
    role: str  # "real", "teacher", "student", "baseline", "autoencoder"
    n: int
    n_reference: int
    steps: int | None = None
    nfe: int | None = None
    shows: dict[str, float] | None = None  # shares that show the asked colour, the asked form, and both: "asked"
    frechet: float | None = None
    kid_mean: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    psnr: float | None = None  # dB, mean over pictures
    ssim: float | None = None
    shifted_psnr: float | None = None  # dB, the best within 2 px
    copy_ratio: float | None = None  # below 1: the SAR is nearly copied
    regions: dict[str, dict[str, float]] | None = None
    classes: dict[str, dict[str, float]] | None = None  # label -> n and kid, against the real items of that class
    rewards: dict[str, float] | None = None  # name -> mean over pictures
    agreement: dict[str, Any] | None = None  # with, rmse, psnr: same seeds, same conditions
    latency_ms: dict[str, float] | None = None  # batch of one; n: calls timed
    speed_up: dict[str, float] | None = None  # over each teacher row, from medians of calls that took turns


@dataclass(kw_only=True)
class Report:
    """What was measured, on what, with what. `rows` in the order of the table."""

    model: str
    teacher: str | None
    task: str
    data: str
    split: str
    n: int
    seeds: list[int]  # first and last; empty where nothing is drawn
    features: dict[str, Any]
    setting: dict[str, Any]  # device, date, torch, threads
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)  # over the training: iteration, kid_teacher, kid_real

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Report":
        """The report that `to_dict` told; keys beside it are left out."""
        own = {f.name: told[f.name] for f in fields(cls) if f.name in told}
        return cls(**{**own, "rows": [Row(**row) for row in told["rows"]]})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    def markdown(self) -> str:
        """The table with its conditions under it."""
        held = next((row.agreement["with"] for row in self.rows if row.agreement), "")
        paced = next((next(iter(row.speed_up)) for row in self.rows if row.speed_up), "")
        heads: list[Column[Row]] = [
            ("", lambda r: r.name, ""), *QUALITY,
            (f"RMSE to {held}", lambda r: r.agreement and r.agreement["rmse"], ".3f"),
            *reward_columns(self.rows),
            ("p50 ms", lambda r: r.latency_ms and r.latency_ms["p50"], ".1f"),
            (f"speed-up over {paced}", lambda r: r.speed_up and next(iter(r.speed_up.values())), ".1f"),
        ]  # fmt: skip
        parts = [markdown_table(heads, self.rows)]
        if by_region := region_table([(row.name, row) for row in self.rows]):
            parts += ["By region:", by_region]
        if by_class := class_table([(row.name, row) for row in self.rows]):
            parts += ["KID x1000 by class:", by_class]
        return "\n\n".join([*parts, "\n".join([self.conditions(), *self.notes])]) + "\n"

    def conditions(self) -> str:
        """On what, with what, where and when, in one line."""
        s, f = self.setting, self.features
        share = f", classifier accuracy {100 * f['accuracy']:.1f} % on {f['n_test']}" if f.get("accuracy") else ""
        drawn = f", seeds {self.seeds[0]} to {self.seeds[1]}" if self.seeds else ""
        return (
            f"n = {self.n}{drawn}; reference: {self.data}, {self.split} split; "
            f"feature space {f['name']}{share}; {s['device']}, {s['threads']} threads, torch {s['torch']}, "
            f"{s['date']}."
        )


QUALITY: list[Column[Row]] = [
    ("NFE", lambda r: r.nfe, ""), ("shows what was asked, %", lambda r: r.shows and 100 * r.shows["asked"], ".1f"),
    ("Frechet", lambda r: r.frechet, ".3f"),
    ("KID x1000", lambda r: None if r.kid_mean is None else 1000 * r.kid_mean, ".2f"),
    ("precision", lambda r: r.precision, ".3f"), ("recall", lambda r: r.recall, ".3f"),
    ("PSNR", lambda r: r.psnr, ".2f"), ("within 2 px", lambda r: r.shifted_psnr, ".2f"),
    ("SSIM", lambda r: r.ssim, ".3f"), ("copy ratio", lambda r: r.copy_ratio, ".2f"),
]  # fmt: skip


def markdown_table(columns: "Sequence[Column[R]]", rows: "Sequence[R]") -> str:
    """One line for each row; "-" for None; a column that no row has anything for is left out."""
    columns = [column for column in columns if any(column[1](row) is not None for row in rows)]
    cells = [[_cell(value(row), form) for _, value, form in columns] for row in rows]
    lines = [[name for name, _, _ in columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reward_columns(rows: "Sequence[Row]") -> "list[Column[Row]]":
    """A column for every reward that any row has."""
    names = dict.fromkeys(name for row in rows for name in row.rewards or {})

    def column(name: str) -> "Column[Row]":
        return (f"reward {name}", lambda row: (row.rewards or {}).get(name), ".4f")

    return [column(name) for name in names]


def class_table(rows: Sequence[tuple[str, Row]]) -> str | None:
    """The distance of every class by itself, a line for each named row; None where there are no classes."""
    rows = [(name, row) for name, row in rows if row.classes]
    labels = dict.fromkeys(label for _, row in rows for label in row.classes or {})
    if not labels:
        return None

    def column(label: str) -> "Column[tuple[str, Row]]":
        return (label, lambda named: _kid(named[1], label), ".0f")

    return markdown_table([("", lambda named: named[0], ""), *(column(label) for label in labels)], rows)


REGION_FIGURES = {"psnr": ".2f", "ssim": ".3f"}  # by region, and how they are printed


def region_table(rows: Sequence[tuple[str, Row]], head: str = "") -> str | None:
    """PSNR and SSIM of every region by itself, a line for each named row; None where no region is known."""
    rows = [(name, row) for name, row in rows if row.regions]
    found = {region: values["n"] for _, row in rows for region, values in (row.regions or {}).items()}
    if not found:
        return None

    def column(region: str, name: str) -> "Column[tuple[str, Row]]":
        title = f"{region} (n = {found[region]}), {name.upper()}"
        return (title, lambda named: (named[1].regions or {}).get(region, {}).get(name), REGION_FIGURES[name])

    columns = [column(region, name) for region in found for name in REGION_FIGURES]
    return markdown_table([(head, lambda named: named[0], ""), *columns], rows)


def _kid(row: Row, label: str) -> float | None:
    found = (row.classes or {}).get(label)
    return None if found is None else 1000 * found["kid"]


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def setting(device: str | torch.device) -> dict[str, Any]:
    """Where and when: device name, date (UTC), torch, threads."""
    return {
        "device": device_name(device), "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
