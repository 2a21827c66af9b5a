"""Ways to run a network, and `Executed`, the network that runs each shape in the way that was prepared for it.

A backend gets the network and example inputs and answers with a function that runs it on inputs of exactly these
shapes. Which one serves is decided by measurement: see `tuning.py`. Only the network is replaced; schedules, guidance
and samplers stay the library's own, so every backend draws what the library draws.

    eager            the network as it was loaded: the reference, and what `determinism: "strict"` runs
    channels-last    NHWC memory format
    bf16             the same under autocast to bfloat16
    xformers         the same with xformers' attention (CUDA, where installed)
    compile          torch.compile for each shape: slow to prepare
    openvino         on a CPU, where installed; openvino-bf16 where the processor knows bfloat16
    ...+graph        on CUDA, any of the torch ones recorded once per shape as a CUDA graph and replayed
"""

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distillers.process import usable_cores

Inputs = tuple[Tensor, Tensor, Tensor | None]  # x (B, C, H, W), time (B,), label (B,) or None
Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]
MISSED = 64  # shapes that are counted


Prepare = Callable[[Inputs], Way]


@dataclass(frozen=True)
class Backend:
    """One way to run networks.

    Args:
        exact: float32 throughout; else the pictures are held against a tolerance.
        threads: of torch, on a CPU.
        open: from a network to what prepares a way for inputs of the given shapes. It leaves the network as it is.
        fallback: the exact backend of the same kind, for shapes that were not held against the tolerance.
    """

    name: str
    exact: bool
    threads: int
    open: Callable[[nn.Module], Prepare]
    fallback: str | None = None

    @property
    def id(self) -> str:
        """Name and threads, as a profile remembers it."""
        return f"{self.name}/{self.threads}"

    def opened(self, networks: Sequence[nn.Module]) -> list[Prepare]:
        """For each of several networks."""
        return [self.open(network) for network in networks]


class Executed(nn.Module):
    """A diffusers network whose calls go the way prepared for their shape; without one, through the network itself.

    It is called on the engine's thread only.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.ways: dict[Any, Way] = {}
        self.strict = False
        self.missed: dict[Any, tuple[int, Inputs]] = {}  # shapes without a way: how often they came, and one example
        self._seen: list[Inputs] | None = None

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        inputs = (sample, timestep, class_labels)
        if self._seen is not None:
            self._seen.append(inputs)
        way = None if self.strict else self.ways.get(shape := signature(inputs))
        if way is None and not self.strict and (shape in self.missed or len(self.missed) < MISSED):
            self.missed[shape] = (self.missed.get(shape, (0, inputs))[0] + 1, inputs)
        return SimpleNamespace(sample=(way or self._plain)(*inputs))

    def _plain(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return plain(self.network)(x, time, label)

    @contextmanager
    def recording(self) -> Iterator[list[Inputs]]:
        """Collects the inputs of all calls."""
        seen: list[Inputs] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None


def signature(inputs: Inputs) -> Any:
    """What a way was prepared for."""
    x, _, label = inputs
    return (*x.shape, x.dtype, label is not None)


def plain(network: nn.Module) -> Way:
    """The network as it is; labels only for who takes them."""

    def run(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        output: Tensor = network(x, time, **({} if label is None else {"class_labels": label})).sample
        return output

    return run


def candidates(device: str, slow: bool) -> list[Backend]:
    """The backends that exist for a device, the reference first; slow ones only on request."""
    threads = usable_cores()
    if device.startswith("cuda"):
        ways = [
            Backend("eager", True, threads, eager),
            Backend("channels-last", True, threads, channels_last),
            Backend("bf16", False, threads, bf16),
            *([Backend("xformers", True, threads, xformers)] if _has("xformers") else []),
            *([Backend("compile", True, threads, compiled)] if slow else []),
        ]
        return ways + [Backend(f"{way.name}+graph", way.exact, threads, graph(way.open)) for way in ways]
    counts = sorted({threads, 1}, reverse=True)
    found = [Backend("eager", True, count, eager) for count in counts]
    found += [Backend("channels-last", True, count, channels_last) for count in counts]
    if _has("openvino"):
        found.append(Backend("openvino", True, threads, openvino("f32")))
        if torch.cpu._is_avx512_bf16_supported():
            found.append(Backend("openvino-bf16", False, threads, openvino("bf16"), fallback=found[-1].id))
    if slow:
        found.append(Backend("compile", True, 1, compiled))
    return found


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


# -- torch -------------------------------------------------------------------------------------------------------------


def eager(network: nn.Module) -> Prepare:
    """The network itself."""
    return lambda inputs: plain(network)


def channels_last(network: nn.Module) -> Prepare:
    """NHWC weights in a copy: the reference keeps its own."""
    own = plain(_nhwc(network))
    return lambda inputs: own


def bf16(network: nn.Module) -> Prepare:
    """NHWC, matrix products and convolutions in bfloat16."""
    own = plain(_nhwc(network))

    def way(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return own(x, time, label).float()

    return lambda inputs: way


def xformers(network: nn.Module) -> Prepare:
    """NHWC, attention by xformers."""
    own: Any = _nhwc(network)
    own.enable_xformers_memory_efficient_attention()
    return lambda inputs: plain(own)


def compiled(network: nn.Module) -> Prepare:
    """Fused kernels for exactly one shape. Needs a C++ compiler on a CPU, Triton on CUDA."""
    own = plain(_nhwc(network))

    def prepare(inputs: Inputs) -> Way:
        run: Way = torch.compile(own, dynamic=False)
        with torch.inference_mode():
            run(*inputs)
        return run

    return prepare


def _nhwc(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def graph(open_: Callable[[nn.Module], Prepare]) -> Callable[[nn.Module], Prepare]:
    """Recorded once with inputs that stay where they are, then replayed: one launch instead of hundreds."""

    def opened(network: nn.Module) -> Prepare:
        prepare = open_(network)

        def recorded(inputs: Inputs) -> Way:
            run = prepare(inputs)
            held = tuple(None if part is None else part.clone() for part in inputs)
            stream = torch.cuda.Stream(inputs[0].device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.inference_mode(), torch.cuda.stream(stream):
                for _ in range(3):  # what is initialised on first use must not be recorded
                    run(*held)  # type: ignore[arg-type]
                graph = torch.cuda.CUDAGraph()
                # other threads go on using the device meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    output = run(*held)  # type: ignore[arg-type]
            torch.cuda.current_stream().wait_stream(stream)

            def way(*given: Tensor | None) -> Tensor:
                for place, value in zip(held, given, strict=True):
                    if place is not None and value is not None:
                        place.copy_(value)
                graph.replay()
                return output.clone()  # the next replay overwrites it

            return way

        return recorded

    return opened


# -- OpenVINO ----------------------------------------------------------------------------------------------------------

_converting = threading.Lock()  # tracing patches torch's own functions
_converted: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()  # one network, any shapes


def openvino(precision: str) -> Callable[[nn.Module], Prepare]:
    """Traced and converted once, then compiled for exactly one shape, on all cores this process may use."""

    def opened(network: nn.Module) -> Prepare:
        def prepare(inputs: Inputs) -> Way:
            import openvino as ov

            given = [part for part in inputs if part is not None]
            with _converting, torch.no_grad():
                warnings.filterwarnings("ignore", "Converting a tensor to a Python")  # constant for one shape
                if network not in _converted:
                    _converted[network] = ov.convert_model(_Positional(network), example_input=tuple(given))
                model = _converted[network].clone()
            shapes = zip(model.inputs, given, strict=True)
            model.reshape({port: ov.PartialShape(list(part.shape)) for port, part in shapes})
            settings = {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": usable_cores(),
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            }
            request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

            def way(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
                arrays = [part.contiguous().numpy() for part in (x, time, label) if part is not None]
                # a copy: the request's own memory is written again by the next pass
                return torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())

            return way

        return prepare

    return opened


class _Positional(nn.Module):
    """What the tracer can follow: tensors in, a tensor out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return plain(self.network)(x, time, label)
