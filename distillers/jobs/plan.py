"""`fewstep plan` tells how much memory the training of a recipe takes, before anything is loaded.

Networks are built from their configurations on torch's meta device, where tensors have shapes and no memory, and handed
to the method itself, so that what is counted is what a training allocates: weights, gradients, the optimizer's state
and averages, exactly. Activations are estimated from what autograd would keep of one forward pass of each player. The
published dimensions of some pipelines lie in `dimensions/`, so that their plans need no download.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distillers import methods
from distillers.data import ImageData
from distillers.data.pixels import check_size
from distillers.errors import BadInput
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe, overridden
from distillers.models.codec import Vae
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.families import Family, family_of
from distillers.models.lora import Adapted, acting, plain
from distillers.teacher import Teacher
from distillers.training.distiller import Distiller, Networks, on_one_base
from distillers.training.head import head_of, usable
from distillers.training.latents import texts_drawn
from distillers.training.settings import TrainSettings
from distillers.training.sharding import parts_to_split
from distillers.weights.manifest import Info
from distillers.weights.read import configurations, read_skeleton

DIMENSIONS = Path(__file__).parent / "dimensions"  # model_index.json and config.json of published pipelines
GB = 1e9
DEVICE_OWN = 0.8e9  # bytes that CUDA takes for itself and its libraries
SLACK = 1.1  # what an allocator loses between tensors
CLIP_TOKENS = 77
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Role:
    """What one network of a training takes, in bytes; of parameters that it shares with another, nothing.

    on_device: whether it lies in the device's memory; what does not is in the machine's own.
    block: bytes of its largest part, which `train.shard` gathers on each device; 0 for what is not split.
    """

    name: str
    parameters: int
    learning: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    on_device: bool = True
    block: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.averages


@dataclass(frozen=True)
class Plan:
    """The memory of a training.

    Attributes:
        activations: bytes that the largest backward pass keeps, estimated, with what the device takes for itself.
        caches: bytes that a picture and a text take in the run's folder, by name; of a text at most.
        items: pictures of the data, where these were found.
    """

    about: str
    roles: list[Role]
    activations: float
    caches: dict[str, float] = field(default_factory=dict)
    items: int | None = None

    @property
    def static(self) -> int:
        """The bytes on the device that stay from one iteration to the next."""
        return sum(role.total for role in self.roles if role.on_device)

    @property
    def total(self) -> float:
        """The bytes on the device at most, estimated."""
        return self.static + self.activations

    def share(self, devices: int) -> float:
        """Estimate the bytes at most on each of so many devices that networks are split over, with `train.shard`."""
        own = sum(role.total / (devices if role.block else 1) for role in self.roles if role.on_device)
        return own + 2 * max((role.block for role in self.roles), default=0) + self.activations  # the next one comes


# --- what stays ------------------------------------------------------------------------------------------------------
def roles_of(nets: Networks, method: Distiller, settings: TrainSettings) -> list[Role]:
    """Count what each network of a method holds, exactly: tensors that several share belong to the first of them.

    A base of adapters is a role of its own, "base".
    """
    seen, roles = set[int](), list[Role]()

    def new(tensors: Iterable[Tensor]) -> list[Tensor]:
        found = [one for one in dict.fromkeys(tensors) if id(one) not in seen]
        seen.update(map(id, found))
        return found

    for name in sorted(nets, key=lambda name: name != "teacher"):
        net: nn.Module = nets[name]
        own = new([*net.parameters(), *net.buffers()])
        learning = [p for p in net.parameters() if p.requires_grad]
        averaged = bool(learning) and settings.ema and name.startswith(method.published)
        roles.append(
            Role(
                name,
                parameters=sum(p.numel() for p in own if isinstance(p, nn.Parameter)),
                learning=sum(p.numel() for p in learning),
                weights=_bytes(own),
                gradients=_bytes(learning),
                optimizer=state_bytes(settings.optimizer, learning),
                averages=_bytes([*net.parameters(), *net.buffers()]) if averaged else 0,
                on_device=not getattr(net, "on_cpu", False),
                block=max((_largest(d.network) for d in _whole(net)), default=0),
            )
        )
    bases = {id(part.base): part.base.network for part in nets.modules() if isinstance(part, Adapted)}
    for network in bases.values():
        own = new([*network.parameters(), *network.buffers()])
        count = sum(p.numel() for p in own if isinstance(p, nn.Parameter))
        roles.insert(0, Role("base", count, 0, _bytes(own), block=_largest(network)))
    return [role for role in roles if role.total]


def _whole(net: nn.Module) -> list[Denoiser]:
    """List the denoisers in a network that are no roles on a base."""
    return [part for part in net.modules() if isinstance(part, Denoiser) and plain(part.network) is part.network]


def _largest(network: nn.Module) -> int:
    """Count the bytes of the largest part that a network is split by."""
    return max((_bytes(part.parameters()) for part in parts_to_split(network)), default=0)


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Count the bytes of an optimizer's state: two moments of each parameter, and its step, a float32.

    With 8 bits: of parameters of 4096 numbers or more a byte a number, a float32 for each 256 of them, and two tables.
    """
    sizes = [(one.numel(), one.nbytes) for one in parameters]
    if optimizer != "adam8bit":
        return sum(2 * size + 4 for _, size in sizes)
    large = [count for count, _ in sizes if count >= 4096]
    small = sum(8 * count for count, _ in sizes if count < 4096)
    return small + sum(2 * count + 8 * -(-count // 256) for count in large) + (2 * 256 * 4 if large else 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


# --- what a backward pass keeps --------------------------------------------------------------------------------------
def kept_bytes(denoiser: Denoiser, x: Tensor, cond: Cond | None, precision: str, checkpointing: bool = False) -> int:
    """Count the bytes that autograd keeps of one pass of a network on the meta device, without its parameters.

    Half precision runs all of it so; besides, it keeps a copy of every float32 weight that it casts. Attention is
    taken to keep its inputs and its output alone, as all of torch's kernels but the plain one do. With checkpointing it
    is the inputs of all blocks and what the greediest of them keeps when it is computed again.
    """
    role: nn.Module = denoiser.network
    with acting(role) as plain:
        network: Any = copy.deepcopy(plain)
    dtype, casts = HALF.get(precision, torch.float32), 0
    if precision in HALF:
        casts = 2 * sum(p.numel() for p in network.parameters() if p.dtype == torch.float32)
        nn.Module.to(network, dtype)
    blocks = _Blocks()
    if checkpointing and getattr(network, "_supports_gradient_checkpointing", False):
        network.train().enable_gradient_checkpointing(blocks.run)
    twin = copy.copy(denoiser)
    twin._modules = {**denoiser._modules, "network": network}
    x = x.to(dtype).requires_grad_()
    own = {id(p) for p in network.parameters()}
    with _counted(own) as kept, _NoScores():
        twin.output(x, torch.tensor(float(twin.schedule.t_max)).to(x), cond)
    return kept.total + blocks.inputs + blocks.greediest + casts


class _Kept:
    """What autograd keeps: each storage once."""

    def __init__(self, without: set[int]) -> None:
        self.without, self.found = without, dict[int, Tensor]()

    def pack(self, tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if id(whole) not in self.without:
            self.found[id(whole)] = whole
        return tensor

    @property
    def total(self) -> int:
        return _bytes(self.found.values())


@contextmanager
def _counted(without: set[int]) -> Iterator[_Kept]:
    kept = _Kept(without)
    with saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        yield kept


class _Blocks:
    """Runs the blocks of a network as gradient checkpointing does, and counts what that keeps."""

    def __init__(self) -> None:
        self.inputs = self.greediest = 0

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        self.inputs += _bytes(tensors[:1])  # the others are the same for all blocks
        own = {id(p) for p in block.parameters()} if isinstance(block, nn.Module) else set()
        with _counted(own) as kept:
            output = block(*inputs)
        self.greediest = max(self.greediest, kept.total)
        return output


class _Attention(torch.autograd.Function):
    """An attention that keeps its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _NoScores(TorchFunctionMode):
    """Lets attention keep no scores: the meta device would take the plain kernel, which does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs or {}).values()]
            return _Attention.apply(*given[:3])
        return func(*args, **(kwargs or {}))


# --- a teacher without weights ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Planned(Teacher):
    """A teacher whose networks are on the meta device; its examples are made up from its configuration."""

    def example(self) -> tuple[Tensor, Cond | None]:
        side = (length // self.codec.factor for length in self.info.size)
        x0, network = torch.zeros(1, self.codec.channels(self.info.channels), *side), self.initial.network
        family = family_of(network)
        cond = told(family, network.config, self.info) if family and family.words else self.condition.example()
        return x0.to("meta"), {k: v.to("meta") for k, v in cond.items()} if cond else None


def told(family: Family, config: Any, info: Info) -> Cond:
    """Make up what a network is told of a prompt, (1, ...), by its configuration."""
    assert family.words is not None
    words, length = family.words, text_length(family)
    found = {"text": torch.zeros(1, length, config[words.width])}
    if "pooled" in words.returns:
        of_ids = config.get("addition_time_embed_dim") or 0
        width = config.get("pooled_projection_dim") or config["projection_class_embeddings_input_dim"] - 6 * of_ids
        found["pooled"] = torch.zeros(1, width)
    if "mask" in words.returns:
        found["mask"] = torch.ones(1, length, dtype=torch.long)
    if words.ids is not None:
        found["ids"] = torch.tensor([words.ids(*info.size)], dtype=torch.float32)
    if family.guided_by == "input":
        found["guidance"] = torch.ones(1)
    return found


def text_length(family: Family) -> int:
    """Count the tokens of a prompt that a network attends to: CLIP's, the other encoder's, or both."""
    import diffusers

    assert family.words is not None
    kinds = family.words.encoders.values()
    asked = inspect.signature(getattr(diffusers, family.pipelines[0]).encode_prompt).parameters
    long = asked["max_sequence_length"].default if "max_sequence_length" in asked else 0
    return int(long) + CLIP_TOKENS * (not long or sum(kind.endswith("WithProjection") for kind in kinds) > 1)


def published(teacher: str) -> Path:
    """Find the configurations of a teacher: its own folder's, or of a published pipeline those that are shipped."""
    if not Path(teacher).exists():
        for folder in sorted(DIMENSIONS.iterdir()):
            if teacher in (folder.name, *json.loads((folder / "model_index.json").read_text())["ids"]):
                return folder
    return configurations(teacher)


def _of_folder(recipe: Recipe, folder: Path) -> tuple[Planned, dict[str, nn.Module]]:
    """Make the teacher that a recipe names, with the head that its students start with, and its text encoders."""
    parts, encoders = read_skeleton(folder)
    assert isinstance(parts.denoiser, Denoiser)
    info, student, lora = parts.info, recipe.student_settings(), recipe.lora is not None
    if info.task not in (allowed := methods.find(recipe.method).tasks):
        raise BadInput("teacher", f"{recipe.teacher}, a teacher of {info.task}", " or ".join(allowed))
    if "size" in recipe.data:
        info = replace(info, size=check_size(recipe.data["size"]))
    teacher = Planned(parts.denoiser, parts.codec, info, start_time=student.start_time)
    own, head = teacher.denoiser, head_of(student, recipe.distiller(), teacher, adapters=lora)
    if head != own.prediction:
        teacher = replace(teacher, learner=Denoiser(copy.deepcopy(own.network), usable(own), head))
    return teacher, encoders


def _untrained(recipe: Recipe) -> Planned:
    """Make the untrained network of a recipe, which its data decide."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        made = load_teacher(recipe, load_data(recipe))
    return Planned(made.denoiser.to("meta"), made.codec, made.info, made.prompts)


# --- plans -----------------------------------------------------------------------------------------------------------
def plan(recipe: Recipe) -> Plan:
    """Tell what the training of a recipe takes. Raises BadInput for a recipe that no training could begin with."""
    from accelerate import init_empty_weights

    method, settings, lora = recipe.distiller(), recipe.settings(), recipe.lora_settings()
    if method.starts_from == "data":
        raise BadInput("method", recipe.method, "a method that trains a diffusion network")
    folder, encoders = None if recipe.teacher is None else published(recipe.teacher), dict[str, nn.Module]()
    if folder is None:
        teacher = _untrained(recipe)
    else:
        teacher, encoders = _of_folder(recipe, folder)
    data, caches = _data(recipe, teacher), _caches(teacher, settings)
    x0, cond = teacher.example()
    with init_empty_weights():  # adapters and heads have no memory either
        nets = method.networks(teacher if lora is None else on_one_base(teacher, lora))
    roles = [*roles_of(nets, method, settings), *_encoders(recipe, teacher, encoders, data)]
    count = settings.batch // settings.accumulation
    x0, cond = x0.expand(count, *x0.shape[1:]), {k: v.expand(count, *v.shape[1:]) for k, v in (cond or {}).items()}
    kept = [kept_bytes(net, x0, cond, settings.precision, settings.checkpointing) for net in _players(nets)]
    named = f" (as published: {folder.name})" if folder and folder.parent == DIMENSIONS else ""
    height, width = teacher.info.size
    about = f"{recipe.method} of {recipe.teacher or 'an untrained network'}{named}, "
    about += f"{count} picture{'s' * (count > 1)} of {width} x {height} px at a time"
    return Plan(about, roles, SLACK * max(kept, default=0) + DEVICE_OWN, caches, None if data is None else len(data))


def _players(nets: Networks) -> list[Denoiser]:
    """List the denoisers that learn, of those that are built alike one."""
    found = dict[Any, Denoiser]()
    for net in nets.values():
        if isinstance(net, Denoiser) and (learning := [p.shape for p in net.parameters() if p.requires_grad]):
            found.setdefault((str(getattr(net.network, "config", "")), str(learning)), net)
    return list(found.values())


def _data(recipe: Recipe, teacher: Planned) -> ImageData | None:
    """Open the data of a recipe, which decodes no picture; None where they are not on this machine."""
    try:
        return load_data(recipe, drawn=teacher.info)
    except BadInput:
        return None


def _encoders(
    recipe: Recipe, teacher: Planned, encoders: Mapping[str, nn.Module], data: ImageData | None
) -> Iterator[Role]:
    """Count the autoencoder, and the text encoders; these leave the device once all texts are encoded."""
    open_texts = bool(recipe.data.get("clause_dropout")) or (data is not None and texts_drawn(data) is None)
    stay = {"autoencoder": True, "text encoders": open_texts or not recipe.settings().cache_gb}
    for name, nets in (("autoencoder", [teacher.codec]), ("text encoders", encoders.values())):
        own = [one for net in nets for one in (*net.parameters(), *net.buffers())]
        if own:
            count = sum(one.numel() for one in own if isinstance(one, nn.Parameter))
            yield Role(name, count, 0, _bytes(own), on_device=stay[name])


def _caches(teacher: Planned, settings: TrainSettings) -> dict[str, float]:
    """Count the bytes of a picture's latents and of a text's encoding, as they are kept beside the run."""
    x0, cond = teacher.example()
    found = {"a picture's latents": 2.0 * x0.numel()} if isinstance(teacher.codec, Vae) else {}
    if cond and "text" in cond:
        found["a text at most"] = 2.0 * sum(v.numel() for k, v in cond.items() if k in ("text", "pooled"))
    return found if settings.cache_gb else {}


CARDS = (2, 4, 8, 16)
CHANGES = (  # in the order of what they cost: time, then quality
    "train.precision=bf16",
    "train.checkpointing=true",
    "train.accumulation={batch}",
    "train.optimizer=adam8bit",
    "lora.rank=16 lora.base=bf16",
    "train.ema=0",
    "train.batch=1 train.accumulation=1",
)


def changes(recipe: Recipe, limit: float) -> list[tuple[str, Plan]]:
    """Find what to change, one after another, until a training fits into so many bytes; those that help nothing aside.

    Returns:
        Overrides such as "train.checkpointing=true", each with the plan with it and those before it.
    """
    best, found, table = plan(recipe), list[tuple[str, Plan]](), recipe.table()
    for change in CHANGES:
        if best.total <= limit:
            break
        overrides = change.format(batch=recipe.settings().batch).split()
        try:
            changed = Recipe.from_table(overridden(table, overrides))
            tried = plan(changed)
        except BadInput:  # nothing that this method, network or machine could do
            continue
        if tried.total < 0.98 * best.total:
            found.append((" ".join(overrides), tried))
            best, table = tried, changed.table()
    return found


def told_plan(recipe: Recipe, device_memory: float | None, devices: int = 1) -> str:
    """Write a plan as text; with the device's memory in GB whether it fits, and what to change where it does not.

    devices: with `train.shard`, over how many networks are split.
    """
    made, shard = plan(recipe), recipe.settings().shard
    if shard != (devices > 1):
        raise BadInput("devices", devices, "2 or more with train.shard=true" if shard else "1 without train.shard=true")
    lines = [made.about, "", *_table(made.roles), ""]
    lines.append(f"stays on the device  {_gb(made.static)}")
    lines.append(f"activations, about   {_gb(made.activations)}  (the device's own {_gb(DEVICE_OWN)} among them)")
    total = made.share(devices) if shard else made.total
    lines.append(f"in all, about        {_gb(total)}" + (f" on each of {devices} devices" if shard else ""))
    for what, size in made.caches.items():
        every = f", {_gb(size * made.items)} for {made.items} of them" if made.items else ""
        lines.append(f"beside the run       {size / 1e3:.0f} kB {what}{every}")
    if device_memory is None:
        return "\n".join(lines)
    limit = device_memory * GB
    if total <= limit:
        return "\n".join([*lines, "", f"fits into {device_memory:g} GB"])
    lines += ["", f"does not fit into {device_memory:g} GB"]
    tried = [] if shard else changes(recipe, limit)
    for change, plan_then in tried:
        lines.append(f"  with {change}: {_gb(plan_then.total)}" + (", which fits" if plan_then.total <= limit else ""))
    if not tried or tried[-1][1].total > limit:
        last = tried[-1][1] if tried else made
        enough = [count for count in CARDS if count > devices and last.share(count) <= limit]
        if enough:
            lines.append(
                f"  with train.shard=true on {enough[0]} devices: {_gb(last.share(enough[0]))} each, which fits"
            )
        else:
            lines.append("  no change of the recipe makes it fit: a smaller size or another teacher")
    return "\n".join(lines)


def _table(roles: Iterable[Role]) -> list[str]:
    """Write roles as the lines of a table."""
    head = ("", "parameters", "learning", "weights", "gradients", "optimizer", "averages")
    rows = [
        (
            role.name + ("" if role.on_device else " (not on the device)"),
            f"{role.parameters / 1e6:,.1f} M",
            f"{role.learning / 1e6:,.1f} M" if role.learning else "-",
            *(_gb(size) if size else "-" for size in (role.weights, role.gradients, role.optimizer, role.averages)),
        )
        for role in roles
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= 0.05 * GB else f"{size / 1e6:.1f} MB"
