"""Writing weights folders that stock diffusers opens: fp16 safetensors, staged beside the old, the manifest last."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput, check_place
from distillers.models.codec import ImageCodec, PixelUnshuffle, Vae
from distillers.models.denoiser import Denoiser, Routed, clipping_of
from distillers.models.families import UNET, family_of
from distillers.models.fixed_time import as_first_timestep
from distillers.models.lora import (
    Origin,
    fused,
    has_lora,
    kohya_state,
    lora_rank,
    lora_state,
    origin_of,
    plain,
    stacked,
)
from distillers.models.schedule import EDM, RectifiedFlow, VariancePreserving, stock_scheduler
from distillers.models.text import PromptEncoder
from distillers.weights.manifest import (
    ADAPTER,
    COMFY,
    DIFFUSERS_PREDICTIONS,
    EDM_PREDICTIONS,
    MANIFEST,
    PARTS,
    STUDENTS,
    Info,
    Lora,
    digests,
    read_json,
)
from distillers.weights.network import check_finite
from distillers.weights.safety import copy_safety

LCM_POINTS = 50  # LCMScheduler picks its times from this many points (Luo et al. 2023)


def write_autoencoder(folder: Path, codec: Vae, info: Info) -> None:
    """Save an autoencoder (fp16) and its manifest; stock `AutoencoderKL.from_pretrained` opens the folder's vae/."""
    with staged(folder) as new:
        _save_half(codec.vae, new / "vae")
        replace(info, sha256=digests(new)).write(new)


def write_pipeline(
    folder: Path,
    denoiser: Denoiser | Routed,
    codec: ImageCodec,
    info: Info,
    prompts: PromptEncoder | None = None,
    origin: Origin | None = None,
    safety: Path | None = None,
) -> None:
    """Save a network (fp16 safetensors) and its manifest as a folder that stock diffusers opens.

    A network with a LoRA stays as it is. Of text to image, whose stock pipelines load adapters, its folder is the
    adapter alone, in diffusers' form and in ComfyUI's; of other tasks it holds the adapter beside the fused network.

    origin: of the base of an adapter, where the network does not know it.
    safety: a pipeline's folder whose safety checker comes along; an adapter has its base's.
    """
    if _is_called_on_noise(denoiser, info):
        assert isinstance(denoiser, Denoiser)
        denoiser = as_first_timestep(denoiser)
        info = replace(info, step_times={1: [denoiser.schedule.t_min]})
    scheduler = _scheduler(denoiser, info)
    lora, index = None, None
    if isinstance(denoiser, Denoiser) and has_lora(denoiser.network) and info.task == "text-to-image":
        with staged(folder) as new:
            adapter, of = lora_state(denoiser.network), origin or origin_of(denoiser.network)
            if of.below:
                adapter = stacked(adapter, of.below)
            rank, base = max(len(value) for key, value in adapter.items() if "lora_A" in key), of.base or info.teacher
            kind = type(plain(denoiser.network)).__name__
            lora = Lora(rank=rank, base=base, id=of.id, revision=of.revision, sha256=of.sha256, network=kind)
            _save_adapter(adapter, new / ADAPTER)
            _save_adapter(kohya_state(adapter), new / COMFY)
            scheduler.save_pretrained(new / "scheduler")
            replace(info, sha256=digests(new), lora=lora).write(new)
        return
    with staged(folder) as new:
        if isinstance(denoiser, Routed):  # no stock pipeline routes, so the index of its parts names no network
            for k, student in enumerate(denoiser.students):
                _save_half(student.network, new / STUDENTS / str(k))  # type: ignore[arg-type]
            if prompts:
                index = _model_index(denoiser.network, scheduler, codec, info, prompts) or {}
                index.pop(prompts.family.part, None)
        else:
            network = denoiser.network
            if has_lora(network):
                lora = Lora(rank=lora_rank(network), base=info.teacher)
                _save_adapter(lora_state(network), new / ADAPTER)
                network = fused(network)
            _save_half(network, new / (family_of(network) or UNET).part)
            index = _model_index(network, scheduler, codec, info, prompts)
        scheduler.save_pretrained(new / "scheduler")
        if isinstance(codec, Vae):
            _save_half(codec.vae, new / "vae")
        if prompts:
            for name, encoder in prompts.encoders.items():
                _save_half(encoder, new / name)
            for name, tokenizer in prompts.tokenizers.items():
                tokenizer.save_pretrained(new / name)
        if index and safety:
            copy_safety(safety, new, index)
        if index:
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        replace(info, sha256=digests(new), lora=lora).write(new)


def check_target(folder: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a weights folder to make before work goes into it. Folders are compared through links.

    Args:
        inputs: the folders, files and hub ids that it is made from; those that are not on this machine are left out.

    Raises:
        BadInput: a folder that is one of the inputs or lies in one, in which its files would replace or join theirs;
            one that the command runs in; a file; a place where nothing can be written.
    """
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise BadInput("out", str(folder), "a folder of its own: the command runs in this one")
    if place.exists() and not place.is_dir():
        raise BadInput("out", str(folder), "a folder: this is a file")
    above = [one for one in (place, *place.parents) if one.exists()]
    for read in (Path(given).expanduser() for given in inputs):
        if read.exists() and any(one.samefile(read) for one in above):
            raise BadInput("out", str(folder), f"a folder that neither is {read} nor lies in it: that is read")
    check_place(place)
    check_place(place.parent)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder`, whose content replaces the old when the block ends without error.

    What is not published (training/) stays. The network goes first and the manifest, with the digests of all parts,
    comes last: killed at any moment, the folder is the old one, the new one, or refused; never a mixture that opens.
    """
    folder = folder.resolve()
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left behind by a killed process
    new.mkdir(parents=True)
    try:
        yield new
        folder.mkdir(exist_ok=True)
        of_the_old = (*PARTS, ADAPTER, COMFY, "model_index.json", "report.json", "golden.json")
        for name in of_the_old:
            _remove(folder / name)
        for item in sorted(new.iterdir(), key=lambda item: item.name == MANIFEST):
            if item.is_dir():
                _remove(folder / item.name)
            item.replace(folder / item.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _save_half(network: nn.Module, folder: Path) -> None:
    """Save a network at float16, or at float32 where that cannot hold its weights. BadInput if they are not finite."""
    check_finite(network, folder.name)
    # nn.Module.to, not diffusers' own: that one warns about every cast, also where no module needs float32.
    saved: Any = nn.Module.to(copy.deepcopy(network), "cpu", torch.float16)
    if not all(bool(value.isfinite().all()) for value in saved.state_dict().values()):
        largest = max(float(value.abs().max()) for value in network.state_dict().values() if value.numel())
        warnings.warn(f"{folder.name}: weights up to {largest:.3g} are beyond float16, and stay float32", stacklevel=2)
        saved = nn.Module.to(copy.deepcopy(network), "cpu", torch.float32)
    saved.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors writes for the owner alone; a server may be another user
        file.chmod(0o644)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)  # where the teacher lay on this machine
    for name in {"dtype", "torch_dtype"} & set(config):  # transformers would open at this beside float32 of diffusers
        config[name] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_adapter(adapter: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    state = {key: value.to("cpu", torch.float16) for key, value in adapter.items()}
    for key, value in state.items():
        if not bool(value.isfinite().all()):
            raise BadInput(f"{file.name}: {key}", "values that float16 does not hold", "finite weights up to 65504")
    save_file(state, file, {"format": "pt"})
    file.chmod(0o644)


def _model_index(
    network: nn.Module, scheduler: Any, codec: ImageCodec, info: Info, prompts: PromptEncoder | None
) -> dict[str, Any] | None:
    """Describe the stock pipeline that draws this folder's pictures; None where only its parts open one by one.

    For U-Nets it is `ConsistencyModelPipeline`: the only one that hands labels to a UNet2DModel, and it works with
    LCM's and DDIM's schedulers. It knows neither guidance nor a learned variance, and draws squares alone; other shapes
    are drawn by `DDPMPipeline`, which knows no labels and scales no input. EDM's schedulers add no noise between steps.
    """
    import diffusers

    config: Any = network.config
    parts, more = {"scheduler": scheduler}, dict[str, Any]()
    square, exploding = isinstance(config.get("sample_size"), int), type(scheduler).__name__.startswith("EDM")
    if prompts is not None and isinstance(codec, Vae):
        kind, parts[prompts.family.part], parts["vae"] = type(prompts.pipeline).__name__, network, codec.vae
        more |= prompts.index
    elif isinstance(codec, Vae) and type(network).__name__ == "DiTTransformer2DModel":
        kind, parts["transformer"], parts["vae"] = "DiTPipeline", network, codec.vae
        more["id2label"] = {str(i): name for i, name in enumerate(info.labels)}
    elif (
        isinstance(codec, PixelUnshuffle)
        and codec.factor == 1
        and config.in_channels == config.out_channels
        and info.guidance_scale == 1
        and hasattr(scheduler, "scale_model_input")
        and (square or not (info.labels or exploding))
        and not (exploding and info.sampler == "consistency" and info.default_steps > 1)
    ):
        kind, parts["unet"] = "ConsistencyModelPipeline" if square else "DDPMPipeline", network
    else:
        return None
    named = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    return {"_class_name": kind, "_diffusers_version": diffusers.__version__, **more, **named}


def _scheduler(denoiser: Denoiser | Routed, info: Info) -> Any:
    """Make the stock scheduler that samples as `Generator` does. Raises BadInput where there is none."""
    import diffusers

    schedule, prediction = denoiser.schedule, denoiser.prediction
    if isinstance(schedule, RectifiedFlow) and prediction == "flow" and schedule.stock is not None:
        if not info.step_times:
            return stock_scheduler(schedule.stock)
        last = {"shift_terminal": 1 / info.default_steps} if info.default_steps > 1 else {}  # of one step it makes NaN
        fresh = info.sampler == "consistency"
        clock = schedule.clock
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=clock, stochastic_sampling=fresh, **last)
    if isinstance(schedule, RectifiedFlow) and prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.clock, shift=schedule.shift)
    preconditioned = {v: k for k, v in EDM_PREDICTIONS.items()}
    if isinstance(schedule, EDM) and prediction in preconditioned:
        return diffusers.EDMEulerScheduler(**_edm_range(schedule, info), prediction_type=preconditioned[prediction])
    kinds = {v: k for k, v in DIFFUSERS_PREDICTIONS.items()}
    if not isinstance(schedule, VariancePreserving) or prediction not in kinds:
        given = f"{schedule.name} with {prediction}"
        allowed = f"flow with flow, edm with edm or edm-v, or vp with {', '.join(kinds)}: what diffusers samples"
        raise BadInput("schedule, prediction", given, allowed)
    config = {
        **schedule.betas_config,
        "num_train_timesteps": _clock(schedule),
        "prediction_type": kinds[prediction],
        "clip_sample": False,
        **(clipping.to_diffusers() if (clipping := clipping_of(denoiser)) else {}),
    }
    if info.sampler == "consistency":
        return diffusers.LCMScheduler(**config, original_inference_steps=_lcm_points(schedule))
    offset = info.step_times.get(1, [schedule.t_max])[0] - schedule.t_min
    if len(info.step_times) == 1 and offset in (0, 1):  # BOOT's one step is at the first time, or the one behind it
        config |= {"timestep_spacing": "leading", "steps_offset": int(offset)}
    else:
        config["timestep_spacing"] = "trailing"
        if info.task == "text-to-image":
            config["steps_offset"] = 1  # not used by these times, but stock Stable Diffusion warns of any other
    return diffusers.DDIMScheduler(**config, set_alpha_to_one=True)


def _is_called_on_noise(denoiser: Denoiser | Routed, info: Info) -> bool:
    """Tell whether this is BOOT's student of an EDM teacher, whose x0 no stock EDM scheduler takes."""
    called = info.step_times == {1: [denoiser.schedule.t_min]}
    return called and isinstance(denoiser.schedule, EDM) and denoiser.prediction == "x0"


def _edm_range(schedule: EDM, info: Info) -> dict[str, Any]:
    """Make the range of a stock EDM scheduler whose steps, in the default number, are the published ones."""
    times = info.step_times.get(info.default_steps, [schedule.t_max])
    last = times[-1] if len(times) > 1 else schedule.t_min
    return {"sigma_min": last, "sigma_max": times[0], "sigma_data": schedule.sigma_data, "rho": schedule.rho}


def _clock(schedule: VariancePreserving) -> int:
    return int(schedule.t_max) + 1


def _lcm_points(schedule: VariancePreserving) -> int:
    return min(LCM_POINTS, _clock(schedule))


def lcm_times(schedule: VariancePreserving, steps: int) -> list[float]:
    """Return the times of stock LCMScheduler in so many steps, descending. Raises BadInput for none or over 50."""
    import diffusers

    if not 1 <= steps <= _lcm_points(schedule):
        raise BadInput("steps", steps, f"1 to {_lcm_points(schedule)}")
    scheduler: Any = diffusers.LCMScheduler(
        num_train_timesteps=_clock(schedule), original_inference_steps=_lcm_points(schedule)
    )
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]
