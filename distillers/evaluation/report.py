"""Hold the results of an evaluation, and write them as JSON and as Markdown tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from distillers.runtime import device_name

R = TypeVar("R")

Column = tuple[str, Callable[[R], Any], str]  # of a table: its head, the value of a row, how that is formatted


@dataclass(kw_only=True)
class Row:
    """Hold the figures of one model or baseline. None: does not apply. Distances are to the reference."""

    name: str
    role: str  # "real", "teacher", "student", "baseline", "autoencoder"
    n: int
    n_reference: int
    steps: int | None = None
    nfe: int | None = None
    shows: dict[str, float] | None = None  # shares that show the asked colour, the asked form, and both: "asked"
    adherence: dict[str, dict[str, float]] | None = None  # "all", "seen", "unseen" -> `Verdict.shares`
    diversity: float | None = None  # of one prompt's pictures, as a share of that of different prompts'
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
    agreement: dict[str, Any] | None = None  # of the same seeds and conditions: with (the teacher's row), rmse, psnr
    latency_ms: dict[str, float] | None = None  # batch of one; n: calls timed
    speed_up: dict[str, float] | None = None  # over each teacher row, from medians of calls that took turns

    def update(self, figures: Mapping[str, float | None]) -> None:
        """Set figures by name."""
        for name, value in figures.items():
            setattr(self, name, value)


@dataclass(kw_only=True)
class Report:
    """Hold all rows of an evaluation, in the order of the table, and the conditions they were measured under."""

    model: str
    teacher: str | None
    task: str
    data: str
    split: str = "test"
    n: int
    seeds: list[int]  # first and last; empty for an autoencoder
    features: dict[str, Any]
    setting: dict[str, Any]  # device, date, torch, threads
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)  # over the training: iteration, kid_teacher, kid_real

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Report":
        """Rebuild a report from the result of `to_dict`; other keys are ignored."""
        own = {f.name: table[f.name] for f in fields(cls) if f.name in table}
        return cls(**{**own, "rows": [Row(**row) for row in table["rows"]]})

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data, without what does not apply to a row."""
        return {**asdict(self), "rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]}

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(self.to_json())

    def markdown(self) -> str:
        """Return the table as Markdown, with its conditions under it."""
        teacher = next((row.agreement["with"] for row in self.rows if row.agreement), "")
        timed = next((next(iter(row.speed_up)) for row in self.rows if row.speed_up), "")
        heads: list[Column[Row]] = [
            ("", lambda r: r.name, ""),
            *QUALITY,
            (f"RMSE to {teacher}", lambda r: r.agreement and r.agreement["rmse"], ".3f"),
            *reward_columns(self.rows),
            ("p50 ms", lambda r: r.latency_ms and r.latency_ms["p50"], ".1f"),
            (f"speed-up over {timed}", lambda r: r.speed_up and next(iter(r.speed_up.values())), ".1f"),
        ]
        parts = [markdown_table(heads, self.rows)]
        if by_attribute := attribute_table([(row.name, row) for row in self.rows]):
            parts += ["Found of what prompts name, %:", by_attribute]
        if by_region := region_table([(row.name, row) for row in self.rows]):
            parts += ["By region:", by_region]
        if by_class := class_table([(row.name, row) for row in self.rows]):
            parts += ["KID x1000 by class:", by_class]
        return "\n\n".join([*parts, "\n".join([self.conditions(), *self.notes])]) + "\n"

    def conditions(self) -> str:
        """Describe the data, the feature space, the machine and the date in one line."""
        s, f = self.setting, self.features
        share = f", classifier accuracy {100 * f['accuracy']:.1f} % on {f['n_test']}" if f.get("accuracy") else ""
        seeds = f", seeds {self.seeds[0]} to {self.seeds[1]}" if self.seeds else ""
        return (
            f"n = {self.n}{seeds}; reference: {self.data}, {self.split} split; "
            f"feature space {f['name']}{share}; {s['device']}, {s['threads']} threads, torch {s['torch']}, "
            f"{s['date']}."
        )


QUALITY: list[Column[Row]] = [
    ("NFE", lambda r: r.nfe, ""),
    ("shows what was asked, %", lambda r: r.shows and 100 * r.shows["asked"], ".1f"),
    ("follows its prompt, %", lambda r: _followed(r, "all"), ".1f"),
    ("seen pairs, %", lambda r: _followed(r, "seen"), ".1f"),
    ("unseen pairs, %", lambda r: _followed(r, "unseen"), ".1f"),
    ("diversity", lambda r: r.diversity, ".3f"),
    ("Frechet", lambda r: r.frechet, ".3f"),
    ("KID x1000", lambda r: None if r.kid_mean is None else 1000 * r.kid_mean, ".2f"),
    ("precision", lambda r: r.precision, ".3f"),
    ("recall", lambda r: r.recall, ".3f"),
    ("PSNR", lambda r: r.psnr, ".2f"),
    ("within 2 px", lambda r: r.shifted_psnr, ".2f"),
    ("SSIM", lambda r: r.ssim, ".3f"),
    ("copy ratio", lambda r: r.copy_ratio, ".2f"),
]


def markdown_table(columns: "Sequence[Column[R]]", rows: "Sequence[R]") -> str:
    """Write a Markdown table with a line for each row and "-" for None; a column without any value is left out."""
    columns = [column for column in columns if any(column[1](row) is not None for row in rows)]
    cells = [[_cell(value(row), form) for _, value, form in columns] for row in rows]
    lines = [[name for name, _, _ in columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reward_columns(rows: "Sequence[Row]") -> "list[Column[Row]]":
    """Return a column for every reward that any row has."""
    names = dict.fromkeys(name for row in rows for name in row.rewards or {})

    def column(name: str) -> "Column[Row]":
        return (f"reward {name}", lambda row: (row.rewards or {}).get(name), ".4f")

    return [column(name) for name in names]


def class_table(rows: Sequence[tuple[str, Row]]) -> str | None:
    """Write KID x1000 of each class as a table with a line for each named row; None without classes."""
    rows = [(name, row) for name, row in rows if row.classes]
    labels = dict.fromkeys(label for _, row in rows for label in row.classes or {})
    if not labels:
        return None

    def column(label: str) -> "Column[tuple[str, Row]]":
        return (label, lambda named: _kid(named[1], label), ".0f")

    return markdown_table([("", lambda named: named[0], ""), *(column(label) for label in labels)], rows)


def _followed(row: Row, group: str) -> float | None:
    """Return the share of a group's prompts that were followed, in percent; None where it was not judged."""
    shares = (row.adherence or {}).get(group)
    return None if shares is None else 100 * shares["followed"]


def attribute_table(rows: Sequence[tuple[str, Row]]) -> str | None:
    """Write how often each attribute was found as a table with a line for each named row; None without a judge."""
    rows = [(name, row) for name, row in rows if row.adherence]
    attributes = dict.fromkeys(name for _, row in rows for name in (row.adherence or {})["all"])
    attributes = {name: None for name in attributes if name not in ("n", "followed")}
    if not attributes:
        return None

    def column(attribute: str) -> "Column[tuple[str, Row]]":
        return (attribute, lambda named: _found(named[1], attribute), ".1f")

    return markdown_table([("", lambda named: named[0], ""), *(column(name) for name in attributes)], rows)


def _found(row: Row, attribute: str) -> float | None:
    """Return how often an attribute was found where a prompt named it, in percent; None where none did."""
    share = (row.adherence or {})["all"].get(attribute)
    return None if share is None else 100 * share


REGION_FIGURES = {"psnr": ".2f", "ssim": ".3f"}  # by region, and how they are printed


def region_table(rows: Sequence[tuple[str, Row]], head: str = "") -> str | None:
    """Write PSNR and SSIM of each region as a table with a line for each named row; None without regions."""
    rows = [(name, row) for name, row in rows if row.regions]
    counts = {region: values["n"] for _, row in rows for region, values in (row.regions or {}).items()}
    if not counts:
        return None

    def column(region: str, name: str) -> "Column[tuple[str, Row]]":
        title = f"{region} (n = {counts[region]}), {name.upper()}"
        return (title, lambda named: (named[1].regions or {}).get(region, {}).get(name), REGION_FIGURES[name])

    columns = [column(region, name) for region in counts for name in REGION_FIGURES]
    return markdown_table([(head, lambda named: named[0], ""), *columns], rows)


def _kid(row: Row, label: str) -> float | None:
    """Return KID x1000 of a class, None where it is unknown."""
    figures = (row.classes or {}).get(label)
    return None if figures is None else 1000 * figures["kid"]


def _cell(value: Any, form: str) -> str:
    """Format a value of the table."""
    return "-" if value is None else format(value, form)


def setting(device: str | torch.device) -> dict[str, Any]:
    """Describe where and when something is measured: device name, date (UTC), torch version, threads."""
    return {
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
