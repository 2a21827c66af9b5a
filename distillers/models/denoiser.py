"""Any network behind one sentence: `x0 = denoiser(x_t, t, cond)`.

After this wrapper, every loss, sampler and benchmark knows one signature only; whether the network predicts noise,
data, velocity or flow, and how it is told the time, is said here once. It knows no file format: see `weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.schedule import EDM, PREDICTIONS, NoiseSchedule, Prediction, like

# "label": int64 (B,); "sar": float (B, C, H, W) in the network's own layout; "guidance": float (B,), where it varies;
# "text", "pooled", "ids" as `PromptEncoder` gives, and the same of no prompt behind "null_", for guidance
Cond = dict[str, Tensor]


class Denoiser(nn.Module):
    """x0 = denoiser(x_t, t, cond), the minimum-mean-square estimate of the clean data.

    Args:
        network: a diffusers `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`, or a module called as
            `network(x, time, **cond)`.
        schedule: what x_t = alpha x0 + sigma eps means for this network.
        prediction: what the network outputs: "x0", "eps", "v" (alpha eps - sigma x0) or "flow" (eps - x0).
        sigma_data: standard deviation of the data; used only to scale inputs of a variance-exploding schedule.

    Shapes: x_t (B, C, H, W) or (B, D); t () or (B,); result like x_t, float32.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: Prediction, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise BadInput("prediction", prediction, ", ".join(PREDICTIONS))
        self.network, self.schedule, self.prediction, self.sigma_data = network, schedule, prediction, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        output = self.output(x_t, t, cond)
        return self.schedule.x0_from(self.prediction, output, x_t, t)

    def output(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The raw network output, in the network's own prediction type, float32."""
        if isinstance(self.schedule, EDM):  # keep the input near unit variance (Karras et al. 2022, c_in)
            x_in = x_t / like((self.sigma_data**2 + t.double() ** 2).sqrt(), x_t)
        else:
            x_in = x_t
        time = self.schedule.network_time(t)
        if time.ndim == 0 and time.device != x_t.device:  # written there, not copied: a copy would wait for the device
            time = x_t.new_full((x_t.shape[0],), float(time))
        time = time.to(x_t).expand(x_t.shape[0])
        return call_network(self.network, x_in, time, cond or {}).float()

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None, layers: Sequence[str] = ("mid_block",)
    ) -> list[Tensor]:
        """Activations of the named submodules, for discriminators. Each is the module's (first) output tensor.

        The network is left as soon as the last of them has answered: an encoder costs an encoder.

        Raises:
            BadInput: a layer that the network does not have, or does not call (a list of blocks is never called).
        """
        modules = dict(self.network.named_modules())
        missing = [name for name in layers if not name or name not in modules]
        if missing or not layers:
            raise BadInput("layers", missing or list(layers), self._layers())
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                kept[name] = output[0] if isinstance(output, tuple) else output
                if len(kept) == len(set(layers)):
                    raise _AllKept

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in set(layers)]
        try:
            with uncompiled(self.network):  # compiled code would not call the hooks
                self.output(x_t, t, cond)
        except _AllKept:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(kept) < len(set(layers)):
            raise BadInput("layers", [name for name in layers if name not in kept], self._layers())
        return [kept[name] for name in layers]

    def _layers(self) -> str:
        """What can be asked of `features`, as far as a message can say it: blocks, by name."""
        blocks = [
            name if not isinstance(child, nn.ModuleList) else f"{name}.0 to {name}.{len(child) - 1}"
            for name, child in self.network.named_children()
            if not isinstance(child, nn.ModuleList) or len(child)
        ]
        return "submodules that the network calls, e.g. " + ", ".join(blocks)


class _AllKept(Exception):
    """Leaves a network's forward pass when its wanted activations are there."""


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run the own code of a module and its parts inside the block, whatever `nn.Module.compile` made of them before."""
    compiled = {part: part._compiled_call_impl for part in module.modules()}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, code in compiled.items():
            part._compiled_call_impl = code


def call_network(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call a diffusers network, or a plain one, with the condition where it belongs.

    SAR is concatenated, noise-free, to the noisy image (Bai and Xu 2024); labels are `class_labels`.
    """
    if "sar" in cond:
        x = torch.cat([x, cond["sar"].to(x)], dim=1)
    if not hasattr(network, "config"):
        return network(x, time, **({"label": cond["label"]} if "label" in cond else {}))
    x = x.to(next(network.parameters()).dtype)  # a network opened in half precision
    labels: dict[str, Any] = {"class_labels": cond["label"]} if "label" in cond else {}
    if "text" in cond:
        labels["encoder_hidden_states"] = cond["text"].to(x)
    if "pooled" in cond:
        labels["added_cond_kwargs"] = {"text_embeds": cond["pooled"].to(x), "time_ids": cond["ids"]}
    told = [m for m in network.modules() if isinstance(m, GuidedTime)] if "guidance" in cond else []
    for module in told:
        module.scale = cond["guidance"]
    try:
        if type(network).__name__ == "DiTTransformer2DModel":
            sample: Tensor = network(x, timestep=time, **labels).sample
        else:
            sample = network(x, time, **labels).sample
    finally:
        for module in told:
            module.scale = None
    # DiT and improved-DDPM networks also output a learned variance in further channels; the mean comes first.
    channels = x.shape[1] - (cond["sar"].shape[1] if "sar" in cond else 0)
    return sample[:, :channels]


class Guided(nn.Module):
    """Classifier-free guidance by wrapping (Ho and Salimans 2022): uncond + w (cond - uncond), on x0.

    w = 1 is no guidance (one network call); x0, eps and v are affine in each other at fixed (x_t, t), so it does not
    matter on which of them guidance acts. LCM counts w from 0: its w is ours minus 1. A condition "guidance", float
    (B,), takes the place of the one scale.
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: float, null_label: int) -> None:
        super().__init__()
        self.denoiser, self.guidance_scale, self.null_label = denoiser, guidance_scale, null_label
        self.schedule: NoiseSchedule = denoiser.schedule  # type: ignore[assignment]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        null = {k.removeprefix("null_"): v for k, v in (cond or {}).items() if k.startswith("null_")}
        if not cond or not (null or "label" in cond) or (self.guidance_scale == 1 and "guidance" not in cond):
            x0: Tensor = self.denoiser(x_t, t, cond)
            return x0
        w = like(cond["guidance"], x_t) if "guidance" in cond else self.guidance_scale
        cond = {k: v for k, v in cond.items() if k != "guidance" and not k.startswith("null_")}
        uncond = {**cond, **(null or {"label": torch.full_like(cond["label"], self.null_label)})}
        both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
        t2 = t if t.ndim == 0 else torch.cat([t, t])
        with_cond, without = self.denoiser(torch.cat([x_t, x_t]), t2, both).chunk(2)
        guided: Tensor = without + w * (with_cond - without)
        return guided


class Routed(nn.Module):
    """Several denoisers as one: each answers for the labels of its share, all its rows of a batch in one call.

    Args:
        students: denoisers of one schedule and prediction.
        shares: the labels of each; together 0 to N-1, each once.

    Shapes as `Denoiser`'s. The answer for a row depends on its own label alone, whatever else is in the batch.
    """

    student_of: Tensor

    def __init__(self, students: Sequence[Denoiser], shares: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if sorted(label for share in shares for label in share) != list(range(sum(map(len, shares)))):
            raise BadInput("shares", [list(share) for share in shares], "labels from 0 on, each in one share")
        self.students = nn.ModuleList(students)
        of = {label: k for k, share in enumerate(shares) for label in share}
        self.register_buffer("student_of", torch.tensor([of[label] for label in range(len(of))]))
        self.schedule, self.prediction = students[0].schedule, students[0].prediction

    @property
    def network(self) -> Any:
        """The first student's, for what all share: channels, size, classes."""
        return self.students[0].network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        student, x0 = self.student_of[cond["label"]], torch.empty_like(x_t)
        for k in student.unique().tolist():
            rows = student == k
            x0[rows] = self.students[k](
                x_t[rows], t if t.ndim == 0 else t[rows], {key: value[rows] for key, value in cond.items()}
            )
        return x0


# --- a network that is told the guidance scale (Luo et al. 2023, sec. 4.2) -------------------------------------------
class GuidedTime(nn.Module):
    """diffusers' `TimestepEmbedding`, told a guidance scale beside the time.

    project(features(w)) is added to the time's features before the embedding's first layer, where LCM's `cond_proj`
    adds it. For one fixed w that is a shift of that layer's bias, so `fold_guidance` gives the stock network back.
    The projection starts at zero: a new network ignores w.
    """

    FEATURES = 64

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        inputs = embedding.linear_1.in_features  # type: ignore[union-attr]
        self.embedding, self.project = embedding, nn.Linear(self.FEATURES, inputs, bias=False)  # type: ignore[arg-type]
        nn.init.zeros_(self.project.weight)
        self.scale: Tensor | None = None  # (B,), set by `call_network`; w = 1 where None

    def shift(self, scale: Tensor) -> Tensor:
        """What is added to the time's features for guidance scales (B,): (B, inputs)."""
        from diffusers.models.embeddings import get_timestep_embedding

        w = 1000 * (scale - 1).float()  # LCM's convention: 0 is no guidance, and the clock runs to thousands
        shift: Tensor = self.project(get_timestep_embedding(w, self.FEATURES).to(self.project.weight))
        return shift

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        scale = sample.new_ones(len(sample)) if self.scale is None else self.scale
        embedded: Tensor = self.embedding(sample + self.shift(scale).to(sample), condition)
        return embedded


def embed_guidance(network: nn.Module) -> nn.Module:
    """The network itself, its time embeddings replaced by `GuidedTime`. BadInput where it has none."""
    found = [
        (m, k) for m in network.modules() for k, v in m.named_children() if type(v).__name__ == "TimestepEmbedding"
    ]
    if not found:
        raise BadInput("guidance_range", type(network).__name__, "a diffusers network with a TimestepEmbedding")
    for module, name in found:
        setattr(module, name, GuidedTime(getattr(module, name)))
    return network


@torch.no_grad()
def fold_guidance(network: nn.Module, guidance_scale: float) -> nn.Module:
    """The network itself, stock again, answering as it did when told this one scale."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GuidedTime):
                first: Any = child.embedding.linear_1
                scale = torch.full((1,), guidance_scale, device=first.weight.device)
                first.bias += first.weight @ child.shift(scale)[0].to(first.weight)
                setattr(module, name, child.embedding)
    return network
