"""Say what a forward pass is run with, and let one that takes long be run in slices, between which others are served.

A pass belongs to the thread that runs it, so passes of one model may be under way in several threads. A slice is one
call of a network: it runs as it is or, where the pass takes turns, on the device's thread when its turn has come.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

T = TypeVar("T")
Turn = Callable[[Callable[[], Any]], Any]


@dataclass(slots=True)
class Pass:
    """Holds what the networks of a pass are run with. It is a context: of what its thread runs meanwhile.

    Args:
        strict: by the reference backend.
        threads: of torch, on the device's thread; None: as many as before.
        prepared: for each network the functions to run it by, instead of those that are installed.
        networks: for each network another one that is called in its place; none prepares it.
        weigh: sets what those networks depend on, before each slice.
        recorded: a network, and the list that its inputs are added to.
        turn: runs each slice, or raises what ends the pass; None: slices run as they come.
    """

    strict: bool = False
    threads: int | None = None
    prepared: Mapping[Any, Any] | None = None
    networks: Mapping[Any, Any] | None = None
    weigh: Callable[[], None] | None = None
    recorded: tuple[Any, list[Any]] | None = None
    turn: Turn | None = None
    _token: Token["Pass"] | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        """Make it this thread's pass."""
        if self.turn is None:
            if self.threads:
                _set_threads(self.threads)
            if self.weigh is not None:
                self.weigh()
        self._token = _PASS.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _PASS.reset(self._token)


_PASS: ContextVar[Pass] = ContextVar("pass", default=Pass())  # noqa: B039  # the default is never changed


def at_work() -> Pass:
    """Return the pass of this thread."""
    return _PASS.get()


def in_slice(function: Callable[[], T]) -> T:
    """Run a function as one slice of this thread's pass."""
    now = _PASS.get()
    if now.turn is None:
        return function()

    def slice_() -> T:
        import torch

        with replace(now, turn=None), torch.inference_mode():
            return function()

    result: T = now.turn(slice_)
    return result


def sliced(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function that runs another as one slice of its caller's pass."""
    return lambda *given, **named: in_slice(lambda: function(*given, **named))


def _set_threads(threads: int) -> None:
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
