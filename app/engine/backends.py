"""Run networks by different backends, and each call by the function that was prepared for its shapes (`Dispatch`).

A backend takes a network and example inputs and returns a function that runs it on inputs of exactly these shapes.
Measurement decides which one serves: see `tuning.py`. Only the network is replaced; schedules, guidance and samplers
stay the library's own, so every backend draws what the library draws.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from app.engine.passes import Pass, at_work, in_slice
from distillers.models.families import TOLD, family_of
from distillers.models.lora import fused, has_lora
from distillers.runtime import usable_cores

# x (B, C, H, W), time (B,) and what else a network may be told, in the order of `TOLD`; None for what it does not take.
# A decoder takes its latents alone, a text encoder its tokens and, some of them, a mask.
Inputs = tuple[Tensor | None, ...]
Forward = Callable[..., Tensor]
Prepare = Callable[[Inputs], Forward]
MAX_COUNTED = 64  # unprepared shapes that are counted


@dataclass(frozen=True)
class Backend:
    """A backend runs networks in one particular way.

    Args:
        exact: whether it computes in float32 throughout; else its pictures must stay within a tolerance.
        threads: torch's threads on a CPU.
        open: takes a network, which it leaves as it is, and returns the function that prepares it for given inputs.
        fallback: id of the exact backend for shapes whose pictures were not compared.
        unless: names of backends that are better; where one of them draws well enough, this one is not tried.
    """

    name: str
    exact: bool
    threads: int
    open: Callable[[nn.Module], Prepare]
    fallback: str | None = None
    unless: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Return the name and the number of threads, by which a profile refers to a backend."""
        return f"{self.name}/{self.threads}"

    def open_all(self, networks: Sequence[nn.Module]) -> list[Prepare]:
        """Open several networks and return a preparing function for each."""
        return [self.open(network) for network in networks]


class Dispatch(nn.Module):
    """Wraps a network and runs each call, a slice of its pass, by what was prepared for its shapes or by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config, family = network, network.config, family_of(network)
        if family is not None:
            self.family = replace(family, call=lambda _, x, time, cond: self(x, time, *map(cond.get, TOLD)).sample)
        self.prepared: dict[Any, Forward] = {}
        self.unprepared: dict[Any, tuple[int, Inputs]] = {}  # by shapes: number of calls, and an example

    def forward(self, *inputs: Tensor | None) -> Any:
        """Run the network on its inputs: x, time and `TOLD`, or all that an encoder or decoder takes."""
        now = at_work()
        if now.turn is None:
            return SimpleNamespace(sample=self._run(now, inputs))
        return SimpleNamespace(sample=in_slice(lambda: self._run(now, inputs)))

    def _run(self, now: Pass, inputs: Inputs) -> Tensor:
        """Run the network as a pass says."""
        if now.networks is not None and (other := now.networks.get(self)) is not None:
            return plain(other)(*inputs)
        if now.recorded is not None and now.recorded[0] is self:
            now.recorded[1].append(inputs)
        if now.strict:
            return plain(self.network)(*inputs)
        prepared = self.prepared if now.prepared is None else now.prepared[self]
        if (forward := prepared.get(shapes := shapes_of(inputs))) is not None:
            return forward(*inputs)
        if shapes in self.unprepared or len(self.unprepared) < MAX_COUNTED:
            self.unprepared[shapes] = (self.unprepared.get(shapes, (0, inputs))[0] + 1, inputs)
        return plain(self.network)(*inputs)


def shapes_of(inputs: Inputs) -> Any:
    """Return the shapes and types of inputs, by which prepared functions are found."""
    return tuple(None if part is None else (*part.shape, part.dtype) for part in inputs)


def plain(network: nn.Module) -> Forward:
    """Return the function that calls the network itself, in its own precision and with the inputs that it takes."""
    dtype, family = next(network.parameters()).dtype, family_of(network)

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        x = x.to(dtype) if x.is_floating_point() else x
        if family is None:  # an encoder or a decoder
            alone: Tensor = network(x, *(other for other in others if other is not None)).sample
            return alone
        time, *told = others
        assert time is not None
        cond = {name: value for name, value in zip(TOLD, told, strict=True) if value is not None}
        return family.call(network, x, time, cond)

    return run


def candidates(device: str, slow: bool) -> list[Backend]:
    """List the backends that exist for a device, the reference first; those slow to prepare only on request."""
    if device.startswith("cuda"):
        return _cuda_candidates(slow)
    threads = usable_cores()
    counts = sorted({threads, 1}, reverse=True)
    found = [Backend("eager", True, count, eager) for count in counts]
    found += [Backend("channels-last", True, count, channels_last) for count in counts]
    if _installed("openvino"):
        found.append(Backend("openvino", True, threads, openvino("f32")))
        if torch.cpu._is_avx512_bf16_supported():
            found.append(Backend("openvino-bf16", False, threads, openvino("bf16"), fallback=found[-1].id))
    if slow:
        found.append(Backend("compile", True, 1, compiled))
    return found


def _cuda_candidates(slow: bool) -> list[Backend]:
    """List the reference, then all as CUDA graphs, most promising first, then those that may not be recordable."""
    plain_ones = [
        Backend("fp16", False, 1, half(torch.float16)),
        Backend("bf16", False, 1, half(torch.bfloat16), unless=("fp16+graph", "fp16")),
        *([Backend("xformers", True, 1, xformers)] if _installed("xformers") else []),
        Backend("channels-last", True, 1, channels_last),
        *([Backend("compile", True, 1, compiled)] if slow else []),
    ]
    reference = Backend("eager", True, 1, eager)
    recorded = [
        replace(one, name=f"{one.name}+graph", open=graph(one.open), fallback=None if one.exact else "eager+graph/1")
        for one in [*plain_ones, reference]
    ]
    return [reference, *recorded, *(replace(one, unless=(*one.unless, f"{one.name}+graph")) for one in plain_ones)]


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


# -- torch -------------------------------------------------------------------------------------------------------------


def eager(network: nn.Module) -> Prepare:
    """Run the network itself."""
    return lambda inputs: plain(network)


def channels_last(network: nn.Module) -> Prepare:
    """Run a copy of the network in NHWC memory format."""
    own = plain(_nhwc(network))
    return lambda inputs: own


def half(dtype: torch.dtype) -> Callable[[nn.Module], Prepare]:
    """Run a copy in NHWC with weights and activations in a type of 16 bits; the time stays float32."""

    def open_(network: nn.Module) -> Prepare:
        own = plain(_nhwc(network, dtype))

        return lambda inputs: lambda *given: own(*given).float()

    return open_


def xformers(network: nn.Module) -> Prepare:
    """Run a copy in NHWC with the attention of xformers."""
    own: Any = _nhwc(network)
    for part in own.modules():
        if hasattr(part, "enable_xformers_memory_efficient_attention"):
            part.enable_xformers_memory_efficient_attention()
            break
    return lambda inputs: plain(own)


def compiled(network: nn.Module) -> Prepare:
    """Compile a copy for exactly one shape by torch.compile, which needs a C++ compiler on a CPU, Triton on CUDA."""
    own = plain(_nhwc(network))

    def prepare(inputs: Inputs) -> Forward:
        run: Forward = torch.compile(own, dynamic=False)
        with torch.inference_mode():
            run(*inputs)
        return run

    return prepare


_copies: Any = WeakIdKeyDictionary()  # of parameters: weak references to their copies in NHWC, by type


def _nhwc(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a network in NHWC. The copies of networks on the same weights, as adapters of one base are, share theirs."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): _copy_of(tensor, dtype) for tensor in tensors})


def _copy_of(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    known = _copies.setdefault(tensor, {})
    if (copied := known[dtype]() if dtype in known else None) is None:
        copied = tensor.detach().to(dtype)
        if copied.ndim == 4:
            copied = copied.contiguous(memory_format=torch.channels_last)
        copied = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied.clone()
        known[dtype] = weakref.ref(copied)
    return copied


def graph(open_: Callable[[nn.Module], Prepare]) -> Callable[[nn.Module], Prepare]:
    """Record another backend's function once per shape as a CUDA graph and replay it: one launch, not hundreds."""

    def open_recorded(network: nn.Module) -> Prepare:
        prepare = open_(network)

        def recorded(inputs: Inputs) -> Forward:
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
            return _Replay(run, held, graph, output)

        return recorded

    return open_recorded


@dataclass(frozen=True)
class _Replay:
    """Replays a CUDA graph. It reads the weights where they lay when it was recorded: `run` keeps them there."""

    run: Forward
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


@cache
def _openvino_core() -> Any:
    """Return the one OpenVINO core of this process, which is never unloaded.

    OpenVINO gives the thread that loads its CPU plugin a stack for signal handlers and frees it with the plugin. After
    two plugins that are unloaded in the order they were loaded, the thread keeps a freed one, and its next signal (a
    child that ends, say) ends the process without a word.
    """
    import openvino as ov

    return ov.Core()


def openvino(precision: str) -> Callable[[nn.Module], Prepare]:
    """Convert a network to OpenVINO once and compile it for each shape, on all cores this process may use."""

    def open_(network: nn.Module) -> Prepare:
        def prepare(inputs: Inputs) -> Forward:
            import openvino as ov

            given = [part for part in inputs if part is not None]
            with _converting, torch.no_grad():
                warnings.filterwarnings("ignore", "Converting a tensor to a Python")  # constant for one shape
                if network not in _converted:
                    taken = [part is not None for part in inputs]
                    # it holds a copy of the weights in any case, so an adapter may as well be added to them
                    whole = _Positional(fused(network) if has_lora(network) else network, taken)
                    _converted[network] = ov.convert_model(whole, example_input=tuple(given))
                model, core = _converted[network].clone(), _openvino_core()
            shapes = zip(model.inputs, given, strict=True)
            model.reshape({port: ov.PartialShape(list(part.shape)) for port, part in shapes})
            settings = {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": usable_cores(),
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            }
            request = core.compile_model(model, "CPU", settings).create_infer_request()

            def forward(*parts: Tensor | None) -> Tensor:
                arrays = [part.contiguous().numpy() for part in parts if part is not None]
                # a copy: the request's own memory is written again by the next pass
                return torch.from_numpy(request.infer(arrays, share_inputs=True)[0].copy())

            return forward

        return prepare

    return open_


class _Positional(nn.Module):
    """Wraps a network in the form that OpenVINO's tracer follows: a fixed number of tensors in, one tensor out.

    Args:
        taken: for each of `Inputs`, whether the network takes it.
    """

    def __init__(self, network: nn.Module, taken: Sequence[bool]) -> None:
        super().__init__()
        self.network, self.taken = network, list(taken)

    def forward(
        self,
        a: Tensor,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
        e: Tensor | None = None,
        f: Tensor | None = None,
        g: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Tensor:
        given: Any = iter((a, b, c, d, e, f, g, h))
        return plain(self.network)(*(next(given) if taken else None for taken in self.taken))
