"""Low-rank adapters of a frozen network: y = W x + (alpha / rank) B A x in a layer (LoRA, Hu et al. 2021).

One frozen base carries the adapters of all roles of a training: the student's, the critic's, their averages'. An
`Adapted` is a role: the base seen through one of its adapters, or through none, as the teacher is. It holds no weights
but its adapter's, so that whoever copies, averages, moves, clips or saves it deals with those alone; a copy of it is
another adapter on the same base. The peft library does the layers; it is imported inside functions, for that is slow.

`lora_state` is the adapter in the format that diffusers loads, `fused` the plain network with the change added to its
weights.
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.families import Family, family_of

NAME = "default"  # peft's own name for the one adapter of a network
KOHYA_NAMES = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}  # SDXL's own
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The `lora` table of a recipe, checked when it is built. Raises BadInput naming the field."""

    rank: int = 16  # columns of B and rows of A
    alpha: float | None = None  # the change is scaled by alpha / rank; absent: alpha = rank, no scaling
    targets: tuple[str, ...] = ()  # layers, by the end of their names, such as "to_q"; none: every linear and 2-d conv
    base: Literal["fp32", "bf16", "fp16"] | None = None  # precision of the frozen base; absent: as the teacher is

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput("lora.rank", self.rank, "1 or more")
        if self.alpha is not None and not self.alpha > 0:
            raise BadInput("lora.alpha", self.alpha, "a number above 0")


def add_lora(network: nn.Module, settings: LoraSettings, name: str = NAME) -> nn.Module:
    """Give layers of a network an adapter of float32; freeze all but adapters. Changes the network and returns it.

    B starts as zero, so that the network still answers as before; A is drawn from torch's global generator.

    Args:
        network: a diffusers or a plain network, without an adapter of this name.

    Raises:
        BadInput: targets that match no layer, a rank above the smallest layer's dimension. The first and the last layer
            of a network do not count, which are as narrow as a picture has channels.
        ValueError: the network has this adapter already.
    """
    if has_lora(network, name):
        raise ValueError(f"the network already has an adapter {name}")
    from peft import LoraConfig, inject_adapter_in_model

    layers = _targeted(network, settings)
    # a pattern, for names in a list would match as endings of others, too
    pattern = "|".join(map(re.escape, layers))
    alpha = settings.rank if settings.alpha is None else settings.alpha
    # LoraConfig says int, but only ever divides by it
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=pattern)  # type: ignore[arg-type]
    training, learning = network.training, {p: p.requires_grad for _, p in _adapter_parameters(network)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
        inject_adapter_in_model(config, network, name)
    for parameter, before in learning.items():  # peft freezes the adapters that are not the last
        parameter.requires_grad_(before)
    for parameter in _of(network, name):
        parameter.data = parameter.data.float()
    return network.train(training)


def _targeted(network: nn.Module, settings: LoraSettings) -> list[str]:
    """Name the layers that the settings mean. Raises BadInput where there are none or the rank is above them."""
    own = {n.removesuffix(".base_layer"): m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    # a convolution of groups is no one matrix
    sizes = {n: min(_sides(m)) for n, m in own.items() if ".lora_" not in n and getattr(m, "groups", 1) == 1}
    ends = [target.strip(".") for target in settings.targets]
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in sizes):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in sizes} - set("0123456789")))
            raise BadInput("lora.targets", end, f"ends of names of linear and convolution layers, such as {known}")
    chosen = [name for name in sizes if not ends or any(f".{name}".endswith(f".{end}") for end in ends)]
    outer = {next(iter(sizes)), next(reversed(sizes))}
    narrowest = min((name for name in chosen if name not in outer), key=sizes.__getitem__, default=chosen[0])
    if settings.rank > sizes[narrowest]:
        allowed = f"1 to {sizes[narrowest]}, the dimension of {narrowest}, or lora.targets without it"
        raise BadInput("lora.rank", settings.rank, allowed)
    return chosen


def _sides(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Return how many numbers a layer reads and writes at a place."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1], layer.out_channels


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What base an adapter is for: its hub id and revision, where it has any, and its network's `network_digest`.

    Where an adapter learns on a network that is a base with another adapter added, `base` is that base's name and
    `below` the other adapter, in the form of `lora_state`: both leave as one.
    """

    id: str | None = None
    revision: str | None = None
    sha256: str | None = None
    base: str | None = None
    below: Mapping[str, Tensor] | None = None


def network_digest(network: nn.Module) -> str:
    """Compute a SHA-256, in hexadecimal, of a network's weights at float16, without the adapters on it.

    A network and its copy at half precision have the same. Of a network on the meta device, which has no weights, it is
    of their names alone.
    """
    own = {k.replace(".base_layer.", "."): v for k, v in network.state_dict().items() if ".lora_" not in k}
    digest = hashlib.sha256()
    for name in sorted(own):
        digest.update(name.encode())
        if not own[name].is_meta:
            digest.update(own[name].detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- roles on one base -----------------------------------------------------------------------------------------------
class AdapterBase:
    """A frozen network with the adapters of several roles, and which of them acts now.

    Args:
        network: changed in place: frozen, in evaluation mode (a base has no dropout), at `settings.base`'s precision.
        origin: where others get it; its sha256 is computed here, unless the network has an adapter added.
    """

    def __init__(self, network: nn.Module, settings: LoraSettings, origin: Origin | None = None) -> None:
        origin = origin or Origin()
        self.origin = origin if origin.below else replace(origin, sha256=network_digest(network))
        self.network = network.eval().requires_grad_(False)
        if settings.base is not None:
            nn.Module.to(network, PRECISIONS[settings.base])  # diffusers' own warns of layers that it keeps in float32
        self.settings = settings
        self.active: list[str] = []  # one list for all layers: switching is one assignment, whatever their number
        self.names: list[str] = []

    def add(self) -> str:
        """Add an adapter that changes nothing yet, in float32, and return its name."""
        name = f"adapter{len(self.names)}"
        add_lora(self.network, self.settings, name)
        for _, layer in _layers(self.network):
            layer._active_adapter = self.active
        self.names.append(name)
        return name

    @contextmanager
    def acting(self, names: Sequence[str]) -> Iterator[None]:
        """Let these adapters act inside the block, and those of before afterwards."""
        before = list(self.active)
        self.active[:] = names
        try:
            yield
        finally:
            self.active[:] = before


class Adapted(nn.Module):
    """A role on a shared base: the base with one adapter, or without any. It is called as the base is.

    Its parameters, buffers and state are its adapter's alone. Moving it moves the base; what else is asked of it, such
    as its configuration, the base answers. A deep copy is a new adapter of the same values on the same base.
    """

    def __init__(self, base: AdapterBase, name: str | None = None) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.adapter = nn.Module()
        for path, layer in _layers(base.network) if name else ():
            place = self.adapter
            for part in path.split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module("A", layer.lora_A[name])
            place.add_module("B", layer.lora_B[name])

    @property
    def family(self) -> Family | None:
        """The family of the base."""
        return family_of(self.base.network)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with acting(self) as network:
            return network(*args, **kwargs)

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(self.base.network, key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        if self.name is None:
            return Adapted(self.base)
        twin = Adapted(self.base, self.base.add()).train(self.training)
        for new, own in zip(twin.parameters(), self.parameters(), strict=True):
            new.data = own.detach().clone()
            new.requires_grad_(own.requires_grad)
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Adapted:
        self.base.network._apply(fn, recurse)  # its adapters with it
        return self


@contextmanager
def acting(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the plain network behind a role, with the role's adapter acting inside the block; others as they are."""
    if not isinstance(network, Adapted):
        yield network
        return
    with network.base.acting([network.name] if network.name else []):
        yield network.base.network


def plain(network: nn.Module) -> nn.Module:
    """Return the network behind a role, whose layers all its roles share; others as they are."""
    return network.base.network if isinstance(network, Adapted) else network


def parts_of(module: nn.Module) -> list[nn.Module]:
    """List a module and all its parts, with those of the bases that roles in it are on."""
    found = dict.fromkeys(module.modules())
    for role in [part for part in found if isinstance(part, Adapted)]:
        found |= dict.fromkeys(role.base.network.modules())
    return list(found)


@torch.no_grad()
def start_from(role: Adapted, state: Mapping[str, Tensor], where: str) -> None:
    """Give a role's adapter the values of another one of the same layers and rank, in the form of `lora_state`.

    Raises:
        BadInput: an adapter of other layers or of another rank; `where` names it.
    """
    matched = {path: (A, B) for path, A, B in _matched(role.base.network, state, where)}
    own = {path: layer for path, layer in _layers(role.base.network) if role.name in layer.lora_A}
    if own.keys() != matched.keys():
        other = min(own.keys() ^ matched.keys())
        raise BadInput(
            where, f"an adapter {'without' if other in own else 'with'} {other}", "the layers of lora.targets"
        )
    for path, layer in own.items():
        (A, B), part = matched[path], role.adapter.get_submodule(path)
        if A.shape != part.A.weight.shape:  # type: ignore[union-attr]
            raise BadInput("lora.rank", role.base.settings.rank, f"{len(A)}, the rank of {where}")
        part.A.weight.copy_(A)  # type: ignore[operator, union-attr]
        part.B.weight.copy_(B / layer.scaling[role.name])  # type: ignore[operator, union-attr]


# --- what leaves -----------------------------------------------------------------------------------------------------
def has_lora(network: nn.Module, name: str = NAME) -> bool:
    """Tell whether a role has an adapter, or a plain network one of this name."""
    if isinstance(network, Adapted):
        return network.name is not None
    return name in getattr(network, "peft_config", {})


def lora_rank(network: nn.Module) -> int:
    """Return the rank of a network's adapter."""
    config: Any = plain(network).peft_config
    return int(config[_name(network)].r)


def set_lora_scale(network: nn.Module, scale: float, name: str | None = None) -> None:
    """Set the factor of the trained change: 0 is exactly the teacher, 1 the student. It does not accumulate.

    name: of the adapter, where it is not the network's only one.
    """
    for _, layer in _layers(plain(network)):
        layer.set_scale(name or _name(network), scale)


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Export the adapter for diffusers: "unet.<layer>.lora_A.weight" (rank, in, ...) and lora_B (out, rank, ...).

    The keys of what is no U-Net start with "transformer". B is multiplied by the present scale, alpha / rank included:
    the format has no place for it, and whoever loads the state takes it for 1.
    """
    root, name, state = plain(network), _name(network), dict[str, Tensor]()
    family = family_of(root)
    prefix = family.part if family else "transformer"
    for path, layer in _layers(root):
        state[f"{prefix}.{path}.lora_A.weight"] = layer.lora_A[name].weight.detach()
        state[f"{prefix}.{path}.lora_B.weight"] = layer.lora_B[name].weight.detach() * layer.scaling[name]
    return state


def stacked(above: Mapping[str, Tensor], below: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join two adapters of one network, in the form of `lora_state`, into one that makes the changes of both.

    B2 A2 + B1 A1 = [B2 B1] [A2; A1]: the rank is the sum of theirs, in layers, too, where one of them has less, for not
    every reader knows adapters of several ranks.
    """
    ranks = [max(len(value) for key, value in one.items() if ".lora_A." in key) for one in (above, below)]
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys([*above, *below]):
        side, some = 0 if ".lora_A." in key else 1, above[key] if key in above else below[key]
        parts = []
        for one, rank in zip((above, below), ranks, strict=True):
            parts.append(torch.zeros([rank if i == side else length for i, length in enumerate(some.shape)]))
            if key in one:
                parts[-1].narrow(side, 0, one[key].shape[side]).copy_(one[key])
        joined[key] = torch.cat(parts, side)
    return joined


def kohya_state(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name an adapter for ComfyUI and Kohya's scripts: "lora_unet_<layer with _>.lora_down.weight", lora_up, alpha.

    adapter: in the form of `lora_state`, which has the scale in B, so that alpha is a layer's rank.
    """
    found: dict[str, Tensor] = {}
    for key, value in adapter.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        name = "lora_" + layer.replace(".", "_")
        for ours, theirs in KOHYA_NAMES.items():
            name = name.replace(ours, theirs)
        found[f"{name}.lora_{'down' if kind == 'A' else 'up'}.weight"] = value
        if kind == "A":
            found[f"{name}.alpha"] = torch.tensor(float(len(value)))
    return found


def origin_of(network: nn.Module) -> Origin:
    """Tell what base a network's adapter is for."""
    return network.base.origin if isinstance(network, Adapted) else Origin(sha256=network_digest(network))


@torch.no_grad()
def add_change(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Add an adapter in the form of `lora_state` to the weights of a plain network: W <- W + B A, in place.

    Raises:
        BadInput: an adapter of other layers, or of layers of other shapes; `where` names it.
    """
    for path, A, B in _matched(network, state, where):
        weight: Any = network.get_submodule(path).weight
        a, b = (matrix.to(weight.device, torch.float32).flatten(1) for matrix in (A, B))
        weight.copy_(weight.float() + (b @ a).view_as(weight))


def _matched(network: nn.Module, state: Mapping[str, Tensor], where: str) -> list[tuple[str, Tensor, Tensor]]:
    """List the layers of an adapter, each with its A and B; BadInput where a layer is not the network's."""
    layers, found = dict(network.named_modules()), []
    for key in state:
        path, _, kind = key.partition(".")[2].rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise BadInput(f"{where}: {key}", "a tensor", "lora_A.weight and lora_B.weight of layers")
        weight: Any = getattr(layers.get(path), "weight", None)
        A, B = (state.get(f"{key.rpartition('.lora_')[0]}.lora_{x}.weight") for x in "AB")
        if weight is None or A is None or B is None or (*B.shape[:1], *A[0].shape) != tuple(weight.shape):
            allowed = f"an adapter of layers of this {type(network).__name__}"
            raise BadInput(f"{where}: {key}", list(state[key].shape), allowed)
        if kind.startswith("B"):
            found.append((path, A, B))
    return found


def attach(network: nn.Module, state: Mapping[str, Tensor], name: str, where: str) -> None:
    """Put an adapter in the form of `lora_state` beside a frozen network's weights, which stay as they are.

    It acts at once, with the factor 1, together with those that were attached before: see `set_lora_scale`.

    Raises:
        BadInput: an adapter of other layers, or of layers of other shapes; `where` names it.
    """
    from peft import LoraConfig, inject_adapter_in_model

    matched = _matched(network, state, where)
    pattern, rank = "|".join(re.escape(path) for path, _, _ in matched), max(len(A) for _, A, _ in matched)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), network, name)
    for path, A, B in matched:
        layer: Any = network.get_submodule(path)
        weight = layer.get_base_layer().weight
        for part, values in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
            part.weight = nn.Parameter(values.to(weight.device, weight.dtype), requires_grad=False)
    names = list(network.peft_config)  # type: ignore[arg-type]
    for _, layer in _layers(network):
        layer._active_adapter = names
    network.eval().requires_grad_(False)


M = TypeVar("M", bound=nn.Module)


def twin(module: M) -> M:
    """Copy the structure of a module, with the very tensors of the module as weights: it costs next to no memory."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def fused(network: nn.Module) -> nn.Module:
    """Copy the network, frozen, with the change added to its weights at the present scale, into plain layers.

    A base of half precision becomes float32, which holds the sum.
    """
    whole = copy.deepcopy(plain(network)).requires_grad_(False)
    nn.Module.to(whole, torch.float32)
    for path, layer in list(_layers(whole)):
        if has_lora(network):
            layer.merge(adapter_names=[_name(network)])
        parent, _, child = path.rpartition(".")
        setattr(whole.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(whole, "peft_config"):
        del whole.peft_config
    if getattr(whole, "is_gradient_checkpointing", False):
        whole.disable_gradient_checkpointing()  # type: ignore[operator]
    return whole


def _name(network: nn.Module) -> str:
    return (network.name or NAME) if isinstance(network, Adapted) else NAME


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))


def _adapter_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of all adapters, each with its adapter's name."""
    for _, layer in _layers(network):
        for part in (layer.lora_A, layer.lora_B):
            yield from ((name, parameter) for name, module in part.items() for parameter in module.parameters())


def _of(network: nn.Module, name: str) -> list[nn.Parameter]:
    return [parameter for own, parameter in _adapter_parameters(network) if own == name]
