"""Reading weights folders and any supported diffusers pipeline: a denoiser with its codec and its text encoders."""

from __future__ import annotations

import contextlib
import inspect
import tomllib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillers.errors import BadInput
from distillers.models.clipping import Clipping
from distillers.models.codec import ImageCodec, PixelUnshuffle, Vae
from distillers.models.denoiser import Denoiser, Routed
from distillers.models.families import FAMILIES, NETWORKS, OLD_NAMES, PIPELINES, Family, family_of
from distillers.models.lora import NAME, Origin, add_change, attach, network_digest, twin
from distillers.models.schedule import NoiseSchedule, Prediction, RectifiedFlow, from_diffusers
from distillers.models.text import PromptEncoder
from distillers.weights.manifest import (
    ADAPTER,
    AUTOENCODER,
    COMFY,
    DIFFUSERS_PREDICTIONS,
    EDM_PREDICTIONS,
    MANIFEST,
    PARTS,
    STUDENTS,
    Info,
    Lora,
    base_beside,
    read_json,
    verify,
)
from distillers.weights.network import check_finite, class_rows
from distillers.weights.safety import safety_of
from distillers.weights.single_file import SUFFIX, as_folder

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a network's file
STEMS = ("text_encoder*/model", "safety_checker/model", f"*{WEIGHTS}")
FILES = [
    "*.json",
    "tokenizer*/*.txt",
    "tokenizer*/*.model",
    ADAPTER,
    COMFY,
    *(f"{stem}{end}.safetensors" for stem in STEMS for end in ("", "-*")),
]
FP16_FILES = [f"{stem}.fp16*.safetensors" for stem in STEMS]
VAES = ("vae", "vqvae")  # where a pipeline keeps its autoencoder
AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")
LAYERS = 1000  # of one kind in a network, at most
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OTHERS_OF_DDPM = ("LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "SASolverScheduler")
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
OTHER_CLOCKS = {  # options of diffusers' schedulers that change the times or noises a network is called with
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "invert_sigmas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "sigma_schedule": "karras",
}
READ = (MANIFEST, "model_index.json")  # of a folder's own JSON files, what its weights depend on
STOCK_CLOCKS = ("use_flow_sigmas", "use_dynamic_shifting", "shift_terminal")  # of them, what text to image is read with
HOPELESS = 1000.0  # sigma/alpha at t_max from which a prediction of noise says nothing of the picture


@dataclass(frozen=True)
class Parts:
    """The parts of an opened folder."""

    denoiser: Denoiser | Routed
    codec: ImageCodec
    info: Info
    prompts: PromptEncoder | None = None  # of text-to-image
    safety: Path | None = None  # the folder whose safety checker judges the pictures
    base: Base | None = None  # whose weights these are, where others may have them too


@dataclass(eq=False)
class Base:
    """A text-to-image pipeline whose weights several adapters share."""

    parts: Parts

    @cached_property
    def sha256(self) -> str:
        """The `network_digest` of its network."""
        return network_digest(self.parts.denoiser.network)

    def twin(self) -> Parts:
        """Return parts of their own structure, on these very weights."""
        own = self.parts
        prompts = own.prompts and twin(own.prompts)
        return replace(own, denoiser=twin(own.denoiser), codec=twin(own.codec), prompts=prompts, base=self)


class Bases:
    """Opens text-to-image pipelines once for all that share their weights, and forgets those that nobody has."""

    def __init__(self) -> None:
        self._open = weakref.WeakValueDictionary[Any, Base]()

    def open(self, folder: Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Base:
        """Open a folder, or return what is open of it, if its files are still the same. BadInput as `read_pipeline`."""
        folder = folder.resolve()
        files = [*folder.glob("*.json"), *folder.rglob("*.safetensors")]
        stats = ((str(file), file.stat()) for file in sorted(files) if file.name in READ or file.suffix != ".json")
        version = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
        key = (folder, version, str(device), dtype)
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = Base(read_pipeline(folder, device, dtype))
        return found


def read_autoencoder(path_or_hub_id: str | Path, device: str | torch.device = "cpu") -> tuple[Vae, Info | None]:
    """Open the autoencoder in vae/ of a folder or hub id, and the manifest, if there is one.

    Raises:
        BadInput: no such folder, no AutoencoderKL in it, missing or damaged weights.
    """
    folder = _local(path_or_hub_id)
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info:
        verify(folder, info)
    codec = _codec(folder, info)
    if not isinstance(codec, Vae):
        raise BadInput("autoencoder", str(path_or_hub_id), "a folder or hub id with an AutoencoderKL in vae/")
    return codec.to(device), info


def read_pipeline(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    bases: Bases | None = None,
) -> Parts:
    """Open a weights folder or any supported diffusers pipeline: a folder, a hub id or a checkpoint of one file.

    bases: where text-to-image folders get weights that others have too: an adapter then lies beside those of its
        base, to which it is added otherwise.

    Raises:
        BadInput: no such folder, a pipeline or network class we do not know, missing or damaged weights.
    """
    folder = _local(path_or_hub_id)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in (None, *PIPELINES):
        raise BadInput(f"{folder}: pipeline", index["_class_name"], ", ".join(PIPELINES))
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info and info.task == AUTOENCODER:
        allowed = "a folder that draws pictures; this one reconstructs them, for a recipe's model.autoencoder"
        raise BadInput(f"{folder}: task", info.task, allowed)
    if info:
        verify(folder, info)
    if info and info.lora and info.alone:
        return _adapted(folder, info, info.lora, device, dtype, bases)
    if info and bases and info.task == "text-to-image":
        return replace(bases.open(folder, device, dtype).twin(), info=info)
    networks = [_load(place, NETWORKS, dtype) for place in _networks(folder, index, info)]
    family = _family(folder, networks[0])
    schedule, clipping, prediction = _sampling(_part(folder, index, "scheduler"), family)
    if prediction == "eps" and (ratio := float(schedule.noise_ratio(torch.tensor(schedule.t_max)))) > HOPELESS:
        warnings.warn(
            f"{folder.name} predicts noise (prediction_type epsilon) at a signal-to-noise ratio (SNR) of almost 0: at "
            f"t = {schedule.t_max:g} its error is multiplied by sigma/alpha = {ratio:.2g} in the clean estimate. "
            "Schedules with rescale_betas_zero_snr are for networks that predict v.",
            stacklevel=2,
        )
    codec, prompts = _codec(folder, info, family if index.get("_class_name") else None, dtype), None
    if family.words:
        prompts = _prompts(folder, index, family, networks[0], dtype).to(device)
    _check_autoencoder(folder, index)
    info = info or _describe(folder, networks[0], codec, index, _name(path_or_hub_id, folder))
    for network in networks:
        _check_fit(folder, network, codec, info, prompts)
    denoisers = [Denoiser(network.to(device), schedule, prediction, clipping=clipping) for network in networks]
    denoiser = denoisers[0] if len(denoisers) == 1 else Routed(denoisers, info.clusters or info.shares).to(device)
    safety = safety_of(folder) if family.words else None
    return Parts(denoiser.eval().requires_grad_(False), codec.to(device), info, prompts, safety)


def _adapted(
    folder: Path, info: Info, lora: Lora, device: str | torch.device, dtype: torch.dtype, bases: Bases | None
) -> Parts:
    """Open the base of an adapter's folder, and put the adapter onto its network.

    Raises:
        BadInput: a base that is not found, or is another network than the adapter was trained on.
    """
    from safetensors.torch import load_file

    place, revision = _base(folder, lora)
    allowed = f"{lora.id or lora.base}, the base of {info.name}, with sha256 {str(lora.sha256)[:12]}..."
    try:
        shared = (bases or Bases()).open(_local(place, revision), device, dtype)
    except BadInput as error:
        raise BadInput(f"{folder}: base", f"{place} ({error})", allowed) from None
    base = shared.twin() if bases else shared.parts
    if not isinstance(base.denoiser, Denoiser) or shared.sha256 != lora.sha256:
        raise BadInput(f"{folder}: base", f"{place}, whose network has sha256 {shared.sha256[:12]}...", allowed)
    network, where = base.denoiser.network, str(folder / ADAPTER)
    if bases:
        attach(network, load_file(folder / ADAPTER), NAME, where)
    else:
        add_change(network, load_file(folder / ADAPTER), where)
    schedule, clipping, prediction = _sampling(folder / "scheduler", _family(folder, network))
    denoiser = Denoiser(network, schedule, prediction, clipping=clipping).eval().requires_grad_(False)
    return replace(base, denoiser=denoiser, info=info)


def _base(folder: Path, lora: Lora) -> tuple[str, str | None]:
    """Find the base of an adapter's folder: beside it by name, on the hub, or where its recipe says; and a revision."""
    if beside := base_beside(folder):
        return str(beside), None
    if lora.id:
        return lora.id, lora.revision
    recipe = folder / "recipe.toml"
    named = tomllib.loads(recipe.read_text()).get("teacher") if recipe.is_file() else None
    if not named:
        raise BadInput(f"{folder}: base", lora.base, f"a folder {lora.base} beside it: it holds an adapter alone")
    place = Path(named)
    if (place / MANIFEST).is_file() and (below := Info.read(place)).alone and below.lora:
        return _base(place, below.lora)  # what it was trained on is an adapter of the same base
    return str(named), None


def origin(path_or_hub_id: str) -> Origin:
    """Tell the hub id of a pipeline and its revision; of a folder on this machine nothing.

    Of a folder that holds an adapter alone: what that says of its base, and the adapter.
    """
    from safetensors.torch import load_file

    folder = _local(path_or_hub_id)
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info and info.alone and (lora := info.lora):
        below = load_file(folder / ADAPTER)
        return Origin(id=lora.id, revision=lora.revision, sha256=lora.sha256, base=lora.base, below=below)
    if Path(path_or_hub_id).exists():
        return Origin()
    return Origin(id=path_or_hub_id, revision=folder.name if folder.parent.name == "snapshots" else None)


def _name(path_or_hub_id: str | Path, folder: Path) -> str:
    """Return the name of a folder, or of a model on the hub, whose local copy is named by its revision."""
    return folder.name if Path(path_or_hub_id).exists() else Path(path_or_hub_id).name


def read_info(path_or_hub_id: str | Path) -> Info:
    """Tell what a weights folder or a pipeline draws, from its manifest or its configurations; no weights are read.

    Raises:
        BadInput: no such folder, a network class we do not know, a configuration that builds no network.
    """
    folder = _local(path_or_hub_id)
    if (folder / MANIFEST).is_file():
        return Info.read(folder)
    index = read_json(folder / "model_index.json")
    network = _skeleton(_networks(folder, index, None)[0], NETWORKS)
    vaes = [folder / part for part in VAES if (folder / part / "config.json").is_file()]
    codec = Vae(_skeleton(vaes[0], AUTOENCODERS)) if vaes else PixelUnshuffle(1)
    _check_autoencoder(folder, index)
    return _describe(folder, network, codec, index, _name(path_or_hub_id, folder))


def configurations(path_or_hub_id: str | Path) -> Path:
    """Return a folder that says how a pipeline's networks are built: its own, or of a hub id a copy without weights."""
    if isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1 and not Path(path_or_hub_id).exists():
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # whatever it is, opening the folder says what is wrong
            return Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json"]))
    return _local(path_or_hub_id)


def read_skeleton(folder: Path) -> tuple[Parts, dict[str, nn.Module]]:
    """Build a pipeline by its configurations on torch's meta device, where networks take no memory.

    Returns:
        What `read_pipeline` would, without the encoder of prompts, and the text encoders by their names.

    Raises:
        BadInput: as `read_info`, and several students in one folder.
    """
    import transformers

    index = read_json(folder / "model_index.json")
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    places = _networks(folder, index, info)
    if len(places) > 1:
        raise BadInput("teacher", str(folder), "a folder of one network, such as one of its students")
    network = _skeleton(places[0], NETWORKS)
    family, place = _family(folder, network), _part(folder, index, "scheduler")
    options = _options(place, read_json(place / "scheduler_config.json"), family)
    (schedule, clipping), prediction = _schedule(place, options), _prediction(place, options)
    if isinstance(schedule, RectifiedFlow) and family.words:
        schedule.stock = options
    vaes = [folder / part for part in VAES if (folder / part / "config.json").is_file()]
    codec = Vae(_skeleton(vaes[0], AUTOENCODERS)) if vaes else PixelUnshuffle(info.patch if info else 1)
    encoders: dict[str, nn.Module] = {}
    for name in family.words.encoders if family.words else ():
        if (folder / name).is_dir():
            config = transformers.AutoConfig.from_pretrained(folder / name)
            with torch.device("meta"):
                encoders[name] = getattr(transformers, config.architectures[0])(config)
    info = info or _describe(folder, network, codec, index, folder.name)
    denoiser = Denoiser(network, schedule, prediction, clipping=clipping).eval().requires_grad_(False)
    return Parts(denoiser, codec, info), encoders


def _skeleton(folder: Path, classes: tuple[str, ...]) -> nn.Module:
    """Build a network from its configuration, without memory for its weights."""
    import diffusers

    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in classes:
        raise BadInput(str(folder / "config.json"), kind, "a network of class " + ", ".join(classes))
    if kind == "Transformer2DModel":
        kind = OLD_NAMES.get(str(config.get("norm_type")), kind)
    try:
        with torch.device("meta"):
            network: nn.Module = getattr(diffusers, kind).from_config(config)
    except Exception as error:  # whatever diffusers' constructors make of wrong options
        raise BadInput(str(folder / "config.json"), f"{type(error).__name__}: {error}", f"options of {kind}") from None
    return network


def check_extent(folder: Path) -> None:
    """Refuse networks that are larger than their weights: building one could take all memory before any is read.

    Raises:
        BadInput: naming the configuration, the parameters that it asks for and the bytes that are there.
    """
    for part in ("", "unet", "transformer", f"{STUDENTS}/*", *VAES):
        for file in sorted(folder.glob(f"{part}/config.json".removeprefix("/"))):
            config, classes = read_json(file), (*NETWORKS, *AUTOENCODERS)
            there = sum(weights.stat().st_size for weights in file.parent.glob("*.safetensors"))
            if config.get("_class_name") not in classes or not there:
                continue
            for name, value in config.items():
                if isinstance(value, list) and len(value) > LAYERS:
                    raise BadInput(f"{file}: {name}", f"a list of {len(value)}", f"{LAYERS} or fewer")
                if "layers" in name and max(_whole_numbers(value), default=0) > LAYERS:
                    raise BadInput(f"{file}: {name}", value, f"{LAYERS} or fewer")
            asked = sum(parameter.numel() for parameter in _skeleton(file.parent, classes).parameters())
            if asked > 2 * there:
                raise BadInput(str(file), f"{asked} parameters", f"those of its weights, which are {there} bytes")


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for inner in value:
            yield from _whole_numbers(inner)
    elif isinstance(value, int):
        yield value


def _networks(folder: Path, index: dict[str, Any], info: Info | None) -> list[Path]:
    """Find the folder of the network, or of each student's."""
    if info and info.students > 1:
        return [folder / STUDENTS / str(k) for k in range(info.students)]
    for part in ("unet", "transformer"):
        if (place := _part(folder, index, part) / "config.json").is_file():
            return [place.parent]
    raise BadInput(str(folder), "no unet or transformer", "a diffusers pipeline with a unet or transformer")


def _local(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return a folder on disk: the given one, what a file of weights becomes, or the local copy of a hub id.

    Of the hub JSON and safetensors are read, never code.
    """
    path = Path(path_or_hub_id)
    if path.suffix == SUFFIX and path.is_file():
        return as_folder(path)
    if path.is_dir():
        return path
    is_hub_id = isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1 and path_or_hub_id[0] not in "./~"
    if not is_hub_id or path.parent.is_dir():  # weights/misspelt is no hub id where there is a weights/
        raise BadInput("model", str(path_or_hub_id), "an existing folder or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(str(path_or_hub_id), allow_patterns=FILES, revision=revision))
        parts = (*PARTS, "vqvae", ".")
        if any((found / part / "config.json").is_file() and not _has_weights(found / part) for part in parts):
            wanted = [*FILES, *FP16_FILES]
            found = Path(snapshot_download(str(path_or_hub_id), allow_patterns=wanted, revision=revision))
        return found
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
        raise BadInput(
            "model", path_or_hub_id, f"an existing folder or a reachable hub id ({type(error).__name__})"
        ) from None


def _part(folder: Path, index: dict[str, Any], name: str) -> Path:
    """Find the folder of a pipeline's part: its own or, in the first pipelines of diffusers, the root."""
    return folder if name in index and not (folder / name).is_dir() else folder / name


def _load(folder: Path, classes: tuple[str, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load one network whole; diffusers itself would fill what is missing with random numbers."""
    import diffusers

    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in classes:
        raise BadInput(str(folder / "config.json"), kind, "a network of class " + ", ".join(classes))
    network: nn.Module
    try:
        network, report = getattr(diffusers, kind).from_pretrained(
            folder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=dtype,
            variant=_variant(folder, WEIGHTS),
            output_loading_info=True,
        )
    except Exception as error:  # damaged safetensors surface as several private exception types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(str(folder), reason, "readable safetensors weights") from None
    if report["missing_keys"] or type(network).__name__ == "Transformer2DModel":
        reason = f"{type(network).__name__} without {sorted(report['missing_keys'])[:3]}"
        raise BadInput(str(folder), reason, "a whole network of class " + ", ".join(classes))
    check_finite(network, str(folder))
    return network


def _variant(folder: Path, name: str) -> str | None:
    """Tell which of diffusers' variants of the weights to read: "fp16" where there are no others, else None."""
    plain = any((folder / f"{name}.safetensors{end}").is_file() for end in ("", ".index.json"))
    return "fp16" if not plain and any(folder.glob(f"{name}*fp16*.safetensors")) else None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _prompts(
    folder: Path, index: dict[str, Any], family: Family, network: nn.Module, dtype: torch.dtype
) -> PromptEncoder:
    """Open the encoders and tokenizers of a pipeline. Raises BadInput where they are damaged or not its family's."""
    import transformers

    assert family.words is not None
    parts: dict[str, Any] = {}
    for name, wanted in family.words.encoders.items():
        place, words = folder / name, folder / name.replace("text_encoder", "tokenizer")
        if not place.is_dir():
            if name in family.words.optional:
                continue
            raise BadInput(str(folder), f"no {name}", "a pipeline with the encoders of its prompts")
        try:
            kind = transformers.AutoConfig.from_pretrained(place).architectures[0]
            if wanted not in (kind, (index.get(name) or [None])[-1]):
                raise ValueError(f"an encoder of class {kind}")
            encoder, report = getattr(transformers, wanted).from_pretrained(
                place,
                use_safetensors=True,
                dtype=dtype,
                variant=_variant(place, "model"),
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"without {sorted(report['missing_keys'])[:3]}")
            parts |= {name: encoder, words.name: _tokenizer(words, index)}
        except Exception as error:  # as with networks, damage surfaces as several kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(str(place), reason, f"{wanted} as safetensors, and its tokenizer") from None
        check_finite(encoder, str(place))
    kind = index.get("_class_name")
    return PromptEncoder(
        family, kind if kind in family.pipelines else family.pipelines[0], parts, index, network.config
    )


def _tokenizer(folder: Path, index: dict[str, Any]) -> Any:
    """Open a tokenizer by the class that the pipeline names, one of transformers'; CLIP's where it names none."""
    import transformers

    library, kind = index.get(folder.name) or ("transformers", "CLIPTokenizer")
    if library != "transformers" or not str(kind).replace("Fast", "").endswith("Tokenizer"):
        raise ValueError(f"a tokenizer of class {kind}")
    return getattr(transformers, kind).from_pretrained(folder)


def _options(folder: Path, scheduler: dict[str, Any], family: Family) -> dict[str, Any]:
    """Complete a scheduler's configuration by its class's own defaults, without what the class would ignore."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    kind = scheduler.get("_class_name", "no scheduler")
    known = {k.name for k in KarrasDiffusionSchedulers} | {*OTHERS_OF_DDPM, *EDMS}
    if kind not in known | set(FLOWS):  # any other has another clock, and would be misread
        raise BadInput(str(folder), kind, "scheduler_config.json of " + ", ".join(sorted([*known, *FLOWS])))
    defaults = inspect.signature(getattr(diffusers, kind).__init__).parameters
    if "num_train_timesteps" not in defaults:  # diffusers' stand-in for a class whose dependencies are not installed
        return {**scheduler}
    options = {key: scheduler.get(key, one.default) for key, one in defaults.items() if key != "self"}
    for key, usual in OTHER_CLOCKS.items():
        if key in STOCK_CLOCKS and family.words:  # the stock scheduler itself is asked for the times
            continue
        if options.get(key, usual) != usual:
            raise BadInput(f"{folder}: {key}", options[key], f"{usual}: no other is read")
    return {"_class_name": kind, **options}


def _sampling(folder: Path, family: Family) -> tuple[NoiseSchedule, Clipping | None, Prediction]:
    """Read what a scheduler's folder says: the schedule, the bound on x0, what the network predicts."""
    options = _options(folder, read_json(folder / "scheduler_config.json"), family)
    (schedule, clipping), prediction = _schedule(folder, options), _prediction(folder, options)
    if isinstance(schedule, RectifiedFlow) and family.words:
        schedule.stock = options
    return schedule, clipping, prediction


def _schedule(folder: Path, options: dict[str, Any]) -> tuple[NoiseSchedule, Clipping | None]:
    try:
        return from_diffusers(options), Clipping.from_diffusers(options)
    except BadInput:
        raise
    except Exception as error:  # whatever diffusers' constructor makes of wrong options
        raise BadInput(
            str(folder), f"{type(error).__name__}: {error}", f"options of diffusers' {options['_class_name']}"
        ) from None


def _prediction(folder: Path, options: dict[str, Any]) -> Prediction:
    kind = options["_class_name"]
    if kind in FLOWS or options.get("use_flow_sigmas"):
        return "flow"
    given, known = options.get("prediction_type", "epsilon"), EDM_PREDICTIONS if kind in EDMS else DIFFUSERS_PREDICTIONS
    if given not in known:
        raise BadInput(str(folder / "scheduler"), f"{kind} with {given}", "prediction_type " + ", ".join(known))
    return known[given]


def _codec(
    folder: Path, info: Info | None, family: Family | None = None, dtype: torch.dtype = torch.float32
) -> ImageCodec:
    for part in VAES:
        if (folder / part / "config.json").is_file():
            _check_statistics(folder / part, family)
            if dtype == torch.float16 and read_json(folder / part / "config.json").get("force_upcast", True):
                dtype = torch.float32  # as SDXL's pipeline does: its activations leave float16's range
            return Vae(_load(folder / part, AUTOENCODERS, dtype))
    return PixelUnshuffle(info.patch if info else 1)


def _describe(folder: Path, network: nn.Module, codec: ImageCodec, index: dict[str, Any], name: str) -> Info:
    """Make a manifest for a pipeline that has none, from its networks' configuration."""
    config: Any = network.config
    family = _family(folder, network)
    side = config.get("sample_size") or family.sample_size
    if not side:
        raise BadInput(f"{folder}: sample_size", side, "the size the network was trained at")
    height, width = (side, side) if isinstance(side, int) else side
    classes = family.classes(config)
    names = index.get("id2label")
    names = names if isinstance(names, dict) else {}
    labels = [str(names.get(str(i), i)) for i in range(classes)]
    channels, extra = _channels(config, codec)
    task = "class-to-image" if labels else "image"
    if family.words:
        task = "text-to-image"
    elif isinstance(codec, PixelUnshuffle) and extra > 0:
        task = "sar-to-optical"
    return Info(
        name=name,
        task=task,
        method="diffusion",
        role="teacher",
        data=name,
        sampler="ddim",
        size=(height * codec.factor, width * codec.factor),
        default_steps=50,
        labels=labels,
        codec=codec.kind,
        patch=codec.factor,
        channels=channels,
        guidance_scale=family.guidance,
        sar={"channels": extra, "range": [-1, 1]} if task == "sar-to-optical" else None,
    )


def _check_autoencoder(folder: Path, index: dict[str, Any]) -> None:
    """Refuse with BadInput a pipeline whose index names an autoencoder that is not there: latents are no pictures."""
    for part in VAES:
        if (index.get(part) or [None])[0] and not (folder / part / "config.json").is_file():
            raise BadInput(f"{folder}: {part}", "missing", "the autoencoder that model_index.json names")


def _check_statistics(folder: Path, family: Family | None) -> None:
    """Refuse with BadInput statistics of latents that the pipeline's own code leaves aside: which picture is right?

    family: of the pipeline; None for an autoencoder by itself.
    """
    read = family.statistics if family else ("shift_factor",)
    config = read_json(folder / "config.json")
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(name) and name not in read:
            reader = family.pipelines[0] if family else "no pipeline"
            raise BadInput(f"{folder}: {name}", config[name], f"null: {reader} reads it")


def _family(folder: Path, network: nn.Module) -> Family:
    family = family_of(network)
    if family is None:
        config: Any = network.config
        told = {k: config.get(k) for k in ("addition_embed_type", "time_cond_proj_dim") if config.get(k)}
        allowed = "one that is told what " + ", ".join(f.pipelines[0] for f in FAMILIES if f.words) + " tell theirs"
        raise BadInput(f"{folder}: {type(network).__name__}", told, allowed)
    return family


def _channels(config: Any, codec: ImageCodec) -> tuple[int, int]:
    """Count the bands of a network's pictures, and the channels of the condition beside them at its input.

    As many come out as go in, or twice as many with a learned variance; if less come out, the others are a condition.
    """
    if isinstance(codec, Vae):
        return int(codec.vae.config.get("out_channels") or codec.vae.config.in_channels), 0
    taken, made = int(config.in_channels), int(config.out_channels or config.in_channels)
    if made in (taken, 2 * taken):
        return taken, 0
    bands = made if made < taken else made // 2
    return bands, taken - bands


def _check_fit(folder: Path, network: nn.Module, codec: ImageCodec, info: Info, prompts: PromptEncoder | None) -> None:
    """Refuse with BadInput a network that the manifest does not describe; torch would fail on it later."""
    _check_prompt_encoder(folder, network, info, prompts)
    config: Any = network.config
    channels, sar, rows = codec.channels(info.channels), info.sar_channels, class_rows(network)
    if (info.codec == Vae.kind) != isinstance(codec, Vae) or (sar and isinstance(codec, Vae)):
        raise BadInput(f"{folder}: codec", codec.kind, f"{info.codec} as in fewstep.json; no VAE for SAR")
    packed = _family(folder, network).packing ** 2
    channels, expected = packed * channels, packed * (channels + info.condition(codec).channels)
    if config.in_channels != expected or (config.out_channels or expected) not in (channels, 2 * channels):
        given = f"{config.in_channels} in, {config.out_channels} out"
        raise BadInput(f"{folder}: channels", given, f"{expected} in, {channels} out (or twice that: learned variance)")
    classes = len(info.labels) if info.task == "class-to-image" else 0
    if config.get("class_embed_type") or rows not in ((classes, classes + 1) if classes else (0,)):
        raise BadInput(
            f"{folder}: classes", config.get("class_embed_type") or rows, f"an embedding of {classes} classes"
        )


def _check_prompt_encoder(folder: Path, network: nn.Module, info: Info, prompts: PromptEncoder | None) -> None:
    config: Any = network.config
    if (info.task == "text-to-image") != (prompts is not None):
        raise BadInput(f"{folder}: task", info.task, "text-to-image for a network that is told words, and for no other")
    if prompts is None:
        return
    wide = config[prompts.words.width]
    if prompts.width not in (None, wide):
        allowed = f"a network that is told what its encoders say, {prompts.width} wide"
        raise BadInput(f"{folder}: {prompts.words.width}", wide, allowed)
