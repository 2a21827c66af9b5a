"""Ways to run a network, and `Executed`, the network that runs each shape in the way that was prepared for it.

A backend gets the network and example inputs and answers with a function that runs it on inputs of exactly these
shapes. Which one serves is decided by measurement: see `tuning.py`. Only the network is replaced; schedules, guidance
and samplers stay the library's own, so every backend draws what the library draws.

    eager            the network as it was loaded: the reference, and what `determinism: "strict"` runs
    channels-last    NHWC memory format
    fp16, bf16       the same with weights and activations in half precision (CUDA)
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
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distillers.runtime import usable_cores

# x (B, C, H, W), time (B,), label (B,), and of text: hidden states (B, L, D), pooled (B, P), ids (B, 6); None where a
# network is not told it. A decoder's are its latents alone, a text encoder's its tokens.
Inputs = tuple[Tensor | None, ...]
Way = Callable[..., Tensor]
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
        unless: backends that are finer or faster; where one of them draws well enough, this one is not tried.
    """

    name: str
    exact: bool
    threads: int
    open: Callable[[nn.Module], Prepare]
    fallback: str | None = None
    unless: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Name and threads, as a profile remembers it."""
        return f"{self.name}/{self.threads}"

    def opened(self, networks: Sequence[nn.Module]) -> list[Prepare]:
        """For each of several networks."""
        return [self.open(network) for network in networks]


class Executed(nn.Module):
    """A network whose calls go the way prepared for their shape; without one, through the network itself.

    It is called on the engine's thread only.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.ways: dict[Any, Way] = {}
        self.strict = False
        self.missed: dict[Any, tuple[int, Inputs]] = {}  # shapes without a way: how often they came, and one example
        self._seen: list[Inputs] | None = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Any:
        added = added_cond_kwargs or {}
        pooled, ids = added.get("text_embeds"), added.get("time_ids")
        inputs = (sample, timestep, class_labels, encoder_hidden_states, pooled, ids)
        if self._seen is not None:
            self._seen.append(inputs)
        way = None if self.strict else self.ways.get(shape := signature(inputs))
        if way is None and not self.strict and (shape in self.missed or len(self.missed) < MISSED):
            self.missed[shape] = (self.missed.get(shape, (0, inputs))[0] + 1, inputs)
        return SimpleNamespace(sample=(way or plain(self.network))(*inputs))

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
    return tuple(None if part is None else (*part.shape, part.dtype) for part in inputs)


def plain(network: nn.Module) -> Way:
    """The network as it is, told only what there is to tell, in its own precision."""
    dtype = next(network.parameters()).dtype

    def run(
        x: Tensor,
        time: Tensor | None = None,
        label: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        told: dict[str, Any] = {} if label is None else {"class_labels": label}
        if text is not None:
            told["encoder_hidden_states"] = text.to(dtype)
        if pooled is not None:
            told["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": ids}
        given = (x.to(dtype) if x.is_floating_point() else x, *(() if time is None else (time,)))
        output: Tensor = network(*given, **told).sample
        return output

    return run


def candidates(device: str, slow: bool) -> list[Backend]:
    """The backends that exist for a device, the reference first; slow ones only on request."""
    if device.startswith("cuda"):
        return _on_cuda(slow)
    threads = usable_cores()
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


def _on_cuda(slow: bool) -> list[Backend]:
    """Recorded first, most promising first; each as it is only where it cannot be recorded."""
    ways = [
        Backend("fp16", False, 1, half(torch.float16)),
        Backend("bf16", False, 1, half(torch.bfloat16), unless=("fp16+graph", "fp16")),
        *([Backend("xformers", True, 1, xformers)] if _has("xformers") else []),
        Backend("channels-last", True, 1, channels_last),
        *([Backend("compile", True, 1, compiled)] if slow else []),
    ]
    reference = Backend("eager", True, 1, eager)
    recorded = [
        replace(way, name=f"{way.name}+graph", open=graph(way.open), fallback=None if way.exact else "eager+graph/1")
        for way in [*ways, reference]
    ]
    return [reference, *recorded, *(replace(way, unless=(*way.unless, f"{way.name}+graph")) for way in ways)]


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


def half(dtype: torch.dtype) -> Callable[[nn.Module], Prepare]:
    """NHWC, weights and activations in a type of 16 bits; the time stays as exact as it is given."""

    def opened(network: nn.Module) -> Prepare:
        own = plain(nn.Module.to(_nhwc(network), dtype))

        return lambda inputs: lambda *given: own(*given).float()

    return opened


def xformers(network: nn.Module) -> Prepare:
    """NHWC, attention by xformers."""
    own: Any = _nhwc(network)
    for part in own.modules():
        if hasattr(part, "enable_xformers_memory_efficient_attention"):
            part.enable_xformers_memory_efficient_attention()
            break
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
    # nn.Module.to, not diffusers' own: that one warns about every cast, also where no module needs float32
    return nn.Module.to(copy.deepcopy(network), memory_format=torch.channels_last)  # type: ignore[call-overload]


def graph(open_: Callable[[nn.Module], Prepare]) -> Callable[[nn.Module], Prepare]:
    """Recorded once with inputs that stay where they are, then replayed: one launch instead of hundreds."""

    def opened(network: nn.Module) -> Prepare:
        prepare = open_(network)

        def recorded(inputs: Inputs) -> Way:
            run = prepare(inputs)
            held = tuple(None if part is None else part.clone() for part in inputs)
            stream = torch.cuda.Stream(next(part.device for part in inputs if part is not None))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.inference_mode(), torch.cuda.stream(stream):
                for _ in range(3):  # what is initialised on first use must not be recorded
                    run(*held)
                graph = torch.cuda.CUDAGraph()
                # other threads go on using the device meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    output = run(*held)
            torch.cuda.current_stream().wait_stream(stream)
            return _Recorded(run, held, graph, output)

        return recorded

    return opened


@dataclass(frozen=True)
class _Recorded:
    """A replay. It reads the weights where they lay when it was recorded: `run` keeps them there."""

    run: Way
    held: Inputs
    graph: Any
    output: Tensor

    def __call__(self, *given: Tensor | None) -> Tensor:
        for place, value in zip(self.held, given, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it


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
                    told = [part is not None for part in inputs]
                    _converted[network] = ov.convert_model(_Positional(network, told), example_input=tuple(given))
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

            def way(*parts: Tensor | None) -> Tensor:
                arrays = [part.contiguous().numpy() for part in parts if part is not None]
                # a copy: the request's own memory is written again by the next pass
                return torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())

            return way

        return prepare

    return opened


class _Positional(nn.Module):
    """What the tracer can follow: tensors in, a tensor out. `told` says which of a way's inputs they are."""

    def __init__(self, network: nn.Module, told: Sequence[bool]) -> None:
        super().__init__()
        self.network, self.told = network, list(told)

    def forward(
        self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None,
        e: Tensor | None = None, f: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        given = iter((a, b, c, d, e, f))
        return plain(self.network)(*(next(given) if told else None for told in self.told))
