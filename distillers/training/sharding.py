"""Networks that do not fit one GPU are split over the processes of a training (FSDP2: torch's `fully_shard`).

Each process keeps a part of every weight, of its gradient and of its optimizer's state. A block's weights are gathered
from all processes just before it runs, and given up afterwards. So all processes must call all networks together, also
to draw samples. What is not a diffusion network, such as an adapter or a codec, stays whole.

accelerate's own plugin wraps one model, prepared once; a method here has several, whose parts are called on their own.
torch's modules for this are imported inside functions, for that is slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillers.models.denoiser import Denoiser
from distillers.models.families import family_of
from distillers.models.lora import plain

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class Shards:
    """Split the networks of a training over its processes, until `join` puts them together again.

    Args:
        modules: whatever holds denoisers, on the CPU: each network in them is split once, and moved to the device block
            by block, so that no device ever holds more than its part and one whole block.
        device: of this process. There is one process for each, and a process group of them.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        denoisers = [part for module in modules for part in module.modules() if isinstance(part, Denoiser)]
        self.networks = list(dict.fromkeys(plain(denoiser.network) for denoiser in denoisers))
        self._split = [part for network in self.networks for part in _split(network, self.mesh)]
        # what learns with a whole network, such as heads on its features; beside an adapter it is whole as that is
        for denoiser in denoisers:
            if plain(denoiser.network) is denoiser.network:
                beside = [child for child in denoiser.children() if child is not denoiser.network]
                self.networks += beside
                self._split += [part for child in beside for part in _split(child, self.mesh)]

    def join(self) -> None:
        """Make plain modules of the networks again, whole and on the CPU. All processes call it together."""
        for before in reversed(self._split):
            before.restore()
        for network in self.networks:
            for module in network.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = nn.Parameter(whole(value.detach()), value.requires_grad)
            network.to("cpu")
        self._split = []


@dataclass(frozen=True)
class _Before:
    """Hold what a module was before `fully_shard` made it another class and hung its hooks on it."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: frozenset[str]
    hooks: Mapping[str, frozenset[Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _Before:
        hooks = {name: frozenset(getattr(module, name)) for name in HOOKS}
        return cls(module, type(module), frozenset(module.__dict__), hooks)

    def restore(self) -> None:
        """Undo what was changed, but for the parameters."""
        self.module.__class__ = self.kind
        for name in set(self.module.__dict__) - self.attributes:
            del self.module.__dict__[name]
        for name, kept in self.hooks.items():
            hooks = getattr(self.module, name)
            for key in set(hooks) - kept:
                del hooks[key]


def parts_to_split(network: nn.Module) -> list[nn.Module]:
    """List the parts of a network that are gathered one at a time: its children, the elements of lists one by one."""
    children = [list(child) if isinstance(child, nn.ModuleList) else [child] for child in network.children()]
    return [part for child in children for part in child if any(True for _ in part.parameters())]


def _split(network: nn.Module, mesh: DeviceMesh) -> list[_Before]:
    """Split a network by its parts; adapters stay whole.

    Nothing but what no part has is left to the network itself: a loss of features goes backward from a part on, and
    gathers what the part knows of.
    """
    from torch.distributed.fsdp import fully_shard

    adapters = {p for name, p in network.named_parameters() if ".lora_" in name}
    before = [_Before.of(module) for module in (*parts_to_split(network), network)]
    if family := family_of(network):
        network.family = family  # type: ignore[assignment]  # its class gets another name
    for one in before:
        # also the last: a pass without gradients would leave it whole, and the next would not see what was learnt
        fully_shard(one.module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    return before


# --- tensors ---------------------------------------------------------------------------------------------------------
def is_split(tensor: Any) -> bool:
    """Say whether a tensor is split over processes: a `DTensor`."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory; a tensor that is not split as it is."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def whole(tree: Any) -> Any:
    """Gather split tensors, in nested dictionaries and lists, onto the CPU. All processes call it together."""
    if is_split(tree):
        return tree.full_tensor().cpu()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dictionary of whole tensors into a module, split or not."""
    module.load_state_dict({**state, **{key: _like(value, state[key]) for key, value in module.state_dict().items()}})


def load_whole_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state, of whole tensors, for parameters that are split or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {i: {k: _like(parameters[i], v) for k, v in own.items()} for i, own in state["state"].items()}
    optimizer.load_state_dict({**state, "state": values})


def _like(target: Any, value: Any) -> Any:
    """Split a tensor of the shape of `target` as that is split; anything else stays."""
    if not (is_split(target) and isinstance(value, Tensor) and value.shape == target.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
