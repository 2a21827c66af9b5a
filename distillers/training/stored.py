"""Rows of tensors that were encoded once, in safetensors files beside a run, mapped into memory and not read whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput

SHARED = "FEWSTEP_ENCODED"  # the environment variable that names a folder for the encoded data of many trainings
LENGTHS = "lengths"  # the tensor that says how long each row's ragged parts are
GB = 1e9

Row = Mapping[str, Tensor]


class Stored:
    """Rows of named tensors, made once and kept as `folder/00000.safetensors`, ...; row i is the i-th that was made.

    Every process makes the files whose number falls to it, and waits for the others'. A file that is there is kept: a
    training that goes on makes nothing again.

    Args:
        folder: named after what the rows are made of, for what is there is believed; others beside it are removed,
            unless trainings share the place.
        count: rows.
        make: the rows of these positions.
        each: rows a file.
        on_cpu: whether the training runs on the CPU, where its processes find each other in another way.
        ragged: names of the tensors (length, ...) whose length differs from row to row, one length for all of a row.

    Raises:
        BadInput: another process's files are not to be seen.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        make: Callable[[Sequence[int]], Sequence[Row]],
        each: int = 256,
        ragged: Collection[str] = (),
        *,
        on_cpu: bool,
    ) -> None:
        from accelerate import PartialState

        self.folder, self.count, self.each = folder, count, each
        self._opened: dict[int, tuple[dict[str, Tensor], list[int]]] = {}
        state = PartialState(cpu=on_cpu)
        for number, first in enumerate(range(0, count, each)):
            if number % state.num_processes == state.process_index and not self._file(number).is_file():
                _write(self._file(number), make(range(first, min(first + each, count))), ragged)
        state.wait_for_everyone()
        for number in range(-(-count // each)):
            if not self._file(number).is_file():
                allowed = "a folder that all processes see, or train.cache_gb = 0"
                raise BadInput("out", str(self._file(number)), allowed)
        if state.is_main_process and not os.environ.get(SHARED):
            for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        number, k = divmod(i, self.each)
        if number not in self._opened:
            self._opened[number] = _open(self._file(number))
        tensors, ends = self._opened[number]
        ragged = {name[1:]: t[ends[k] : ends[k + 1]] for name, t in tensors.items() if name.startswith("*")}
        return {name: t[k] for name, t in tensors.items() if not name.startswith("*")} | ragged

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a process that it is sent to maps the files itself


def place_of_encoded(run: Path) -> Path:
    """Say where a training keeps what it encodes once: beside its checkpoints, or where FEWSTEP_ENCODED says."""
    return Path(os.environ.get(SHARED) or run / "encoded")


def _write(file: Path, rows: Sequence[Row], ragged: Collection[str]) -> None:
    """Write rows into one file, all or nothing; the names of ragged tensors begin with *."""
    from safetensors.torch import save_file

    whole = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ragged}
    whole |= {f"*{name}": torch.cat([row[name] for row in rows]) for name in rows[0] if name in ragged}
    lengths = [max([len(row[name]) for name in row if name in ragged], default=0) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({**{k: v.contiguous() for k, v in whole.items()}, LENGTHS: torch.tensor(lengths)}, temporary)
    temporary.rename(file)


def _open(file: Path) -> tuple[dict[str, Tensor], list[int]]:
    """Map a file, and add up where each row's ragged parts begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise BadInput(str(file), str(error), "a whole file; delete it, and it is made again") from None
    lengths = tensors.pop(LENGTHS)
    return tensors, [0, *lengths.cumsum(0).tolist()]


def name_of(*parts: Any) -> str:
    """Name the folder of what is made of these parts: texts, numbers, and networks by their weights."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                ends = value.detach().flatten()
                told = torch.cat([ends[:8], ends[-8:]]).double().tolist()
                digest.update(f"{name} {tuple(value.shape)} {told}\n".encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def check_room(needed: Mapping[str, float], limit: float) -> None:
    """Refuse with BadInput what would take more than `limit` GB; `needed` is in bytes, by what it is for."""
    total = sum(needed.values()) / GB
    if total > limit:
        listed = " and ".join(f"{size / GB:.1f} GB of {what}" for what, size in needed.items() if size)
        allowed = f"{total:.0f} or more, room for {listed}; or 0: they are encoded whenever they are drawn"
        raise BadInput("train.cache_gb", limit, allowed)
