"""The model card of a folder is written from its manifest, recipe and report alone: every number was measured."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillers.errors import BadInput
from distillers.models.families import FAMILIES
from distillers.weights.manifest import ADAPTER, AUTOENCODER, COMFY, STUDENTS, Info, find, read_json

ATTRIBUTION = {
    "avatars": "Pictures drawn by DiceBear from `bigSmile` by Ashley Seo and `personas` by Draftbit, both CC BY 4.0.",
    "eurosat": "EuroSAT (Helber et al. 2019, MIT). Contains modified Copernicus Sentinel data.",
    "sentinel-pairs+sen12-pairs": "Contains modified Copernicus Sentinel data (Sentinel-1 GRD VH and Sentinel-2 "
    "L1C of 2020; SEN1-2, Schmitt et al. 2018, CC-BY).",
    "sentinel-pairs": "Contains modified Copernicus Sentinel data (Sentinel-1 GRD VH, Sentinel-2 L1C, 2020).",
    "shapes": "Procedural; made by this project, no rights reserved.",
}

RADIOMETRY = """

Levels: the SAR learnt from was never calibrated. Its white (99 % quantile) was put at the level that Sentinel-1 has
over land, with 1.5 dB of random gain, so a calibrated raster in dB, power or amplitude is understood as far as that
goes: the model knows bright from dark, but not what a decibel more means. VH was learnt from scenes of two regions, VV
from 64 patches of SEN1-2 and from VH made into VV; no place was learnt with both, so their true ratio tells nothing."""


def results(root: Path) -> str:
    """Write a Markdown table of all reports below root, each figure as its report.json has it."""
    lines = ["| folder | row | NFE | Frechet | KID x1000 | PSNR | p50 ms | n |", "|---|---|---|---|---|---|---|---|"]
    for name, folder in find(root).items():
        if not (folder / "report.json").is_file():
            continue
        for row in read_report(folder)["rows"]:
            kid = row.get("kid_mean")
            cells = (
                row.get("nfe"),
                _figure(row.get("frechet"), ".2f"),
                _figure(None if kid is None else 1000 * kid, ".1f"),
                _figure(row.get("psnr"), ".1f"),
                _figure((row.get("latency_ms") or {}).get("p50"), ".1f"),
                row["n"],
            )
            lines.append(
                f"| {name} | {row['name']} | " + " | ".join("-" if c is None else str(c) for c in cells) + " |"
            )
    return "\n".join(lines) + "\n"


def read_report(folder: Path) -> dict[str, Any]:
    """Read report.json of a weights folder. Raises BadInput for another JSON."""
    report = read_json(folder / "report.json")
    rows = report.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"name", "n"} <= set(row) for row in rows):
        raise BadInput(str(folder / "report.json"), sorted(report), "rows as `fewstep evaluate` writes them")
    return report


def _figure(value: float | None, form: str) -> str | None:
    """Format a number; None stays None."""
    return None if value is None else format(value, form)


def write_card(folder: Path) -> None:
    """Write README.md from fewstep.json, recipe.toml and, once measured, report.json."""
    info = Info.read(folder)
    recipe = (folder / "recipe.toml").read_text() if (folder / "recipe.toml").is_file() else ""
    report = read_report(folder) if (folder / "report.json").is_file() else None
    tags = [info.task] if info.task == AUTOENCODER else ["diffusion", "few-step", info.method, info.task]
    lines = [
        "---",
        "library_name: diffusers",
        "license: apache-2.0",
        "tags: [" + ", ".join(tags) + "]",
        "---",
        "",
        f"# {info.name}",
        "",
        _what(info),
        "",
        "![samples](grid.png)",
        "",
        "## Use",
        "",
        "```python",
        *(
            _use_alone(info, folder)
            if info.alone
            else _use(info, info.students == 1 and (folder / "model_index.json").is_file())
        ),
        "```",
        *_use_adapter(info, "transformer" if (folder / "transformer").is_dir() else "unet"),
        "",
        "## Measured",
        "",
        report["markdown"] if report else "Not measured yet: `fewstep evaluate` writes this part.",
        "",
        *_calibration(folder),
        "## Data and limits",
        "",
        f"Trained on {info.data}. {ATTRIBUTION.get(info.data, 'See the data set for its licence.')}",
        _limits(info),
        "",
        "## How it was made",
        "",
        f"`fewstep distill {info.name}/recipe.toml`{_stood(recipe)}:",
        "",
        "```toml",
        recipe.strip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


def _stood(recipe: str) -> str:
    """Say at which iteration a running training was published, and with whose autoencoder; "" of neither."""
    table = tomllib.loads(recipe)
    said, versions = "", table.get("versions", {})
    if iteration := versions.get("iteration"):
        said = f", published at iteration {iteration} of {table['train']['iterations']}"
    return said + (f", with the autoencoder of `{versions['autoencoder']}`" if "autoencoder" in versions else "")


def _calibration(folder: Path) -> list[str]:
    """Write the part on calibration, if the deviation of samples was measured."""
    if not (folder / "calibration.json").is_file():
        return []
    lines = [read_json(folder / "calibration.json").get("markdown", ""), "![calibration](calibration.png)", ""]
    return [*lines, "![tiles](report-tiles.png)", ""] if (folder / "report-tiles.png").is_file() else lines


def _what(info: Info) -> str:
    """Say what the model is, in a sentence or two."""
    kind = {
        "image": "pictures",
        "class-to-image": f"pictures of {len(info.classes)} classes",
        "sar-to-optical": "optical from SAR",
        "text-to-image": "pictures of what a text says",
    }
    size = "x".join(map(str, info.size))
    if info.task == AUTOENCODER:
        side = "x".join(str(n // info.patch) for n in info.size)
        compared = f" Its loss compared the features of {', '.join(info.trained_with)}." if info.trained_with else ""
        return (
            f"An autoencoder: pictures of {size} px to latents of {side} positions and back. It draws nothing by "
            f"itself; a diffusion model trains in its latents.{compared}"
        )
    if info.role == "teacher":
        return f"A diffusion teacher: {kind[info.task]}, {size} px, {info.default_steps} steps by default."
    counts = ", ".join(map(str, sorted(info.step_times)))
    what = f"A {info.method} student of `{info.teacher}`: {kind[info.task]}, {size} px, in {counts} steps."
    if (clusters := info.clusters) is not None:
        like = [f"those like {clusters.examples[k]!r}" for k in clusters.students]
        if info.part:
            return f"{what} It is one of {len(clusters.centres)}, and has learnt a part of the captions: {like[0]}."
        return what + "".join(f" `{STUDENTS}/{k}` draws {one}." for k, one in enumerate(like))
    if len(info.shares) == 1:
        return f"{what} It is one of several, and draws only: {_names(info, info.shares[0])}."
    shares = (f" `{STUDENTS}/{k}` draws {_names(info, share)}." for k, share in enumerate(info.shares))
    return what + "".join(shares)


def _names(info: Info, share: Sequence[int]) -> str:
    """Name the labels of a share."""
    return ", ".join(info.labels[label] for label in share)


def _use(info: Info, stock: bool) -> list[str]:
    """Write Python that uses the folder: with plain diffusers where `stock`, with this library otherwise."""
    if info.task == AUTOENCODER:
        return [
            "# plain diffusers, no line of ours; pictures are (B, 3, H, W) in [-1, 1]",
            "from diffusers import AutoencoderKL",
            "",
            f'vae = AutoencoderKL.from_pretrained("{info.name}", subfolder="vae")',
            "scale, shift = vae.config.scaling_factor, vae.config.shift_factor",
            "latents = (vae.encode(pictures).latent_dist.mean - shift) * scale  # mean 0, variance 1",
            "pictures = vae.decode(latents / scale + shift).sample",
        ]
    label = info.classes[0] if info.classes else None
    if stock:
        prompt, labels = "", f", class_labels={label}" if info.task == "class-to-image" else ""
        if info.task == "text-to-image":  # its default guidance is 7.5
            prompt, labels = '"a prompt", ', f", guidance_scale={info.guidance_scale}"
        elif info.codec == "vae":  # DiTPipeline wants a list, and its default guidance is 4
            labels = f", class_labels=[{label}], guidance_scale={info.guidance_scale}"
        return [
            "# plain diffusers, no line of ours",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{info.name}")',
            f'pipe({prompt}num_inference_steps={info.default_steps}{labels}).images[0].save("sample.png")',
        ]
    patch = f"; pixels are `pixel_shuffle(x0, {info.patch})`" if info.patch > 1 else ""
    if info.codec == "vae":
        patch = "; pixels are `vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample`"
    parts = f"each folder in {STUDENTS}/" if info.students > 1 else "UNet2DModel"
    lines = [
        f"# parts open with stock classes: {parts} and the scheduler{patch}",
        "from distillers import Generator",
    ]
    if (info.sar or {}).get("form") == "db":
        return [
            *lines,
            "from distillers.sar.demonstration import demonstration",
            "from distillers.sar.translate import translate",
            "",
            'demonstration("scene.tif")  # or a Sentinel-1 scene of your own',
            f'generator = Generator.from_pretrained("{info.name}")',
            'translate(generator, "scene.tif", "optical.tif")  # or `fewstep translate scene.tif optical.tif`',
        ]
    if info.task == "sar-to-optical":
        return [
            *lines,
            "from distillers.data import read_sar",
            "",
            f'sar = read_sar("{info.name}/examples/0.png")',
            f'pixels = Generator.from_pretrained("{info.name}").translate(sar, seed=0)',
        ]
    labels = f", labels=[{label}]" if info.task == "class-to-image" else ""
    labels = f", prompts=[{info.clusters.examples[0]!r}]" if info.clusters else labels
    return [*lines, "", f'pixels = Generator.from_pretrained("{info.name}").sample([0]{labels})']


def _use_alone(info: Info, folder: Path) -> list[str]:
    """Write Python that puts an adapter onto the pipeline of its base, with plain diffusers."""
    assert info.lora is not None
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    base, kind = info.lora.id or info.lora.base, info.lora.network
    names, onto = ["DiffusionPipeline", scheduler], [f'pipe.load_lora_weights("{info.name}", weight_name="{ADAPTER}")']
    if kind and not _loads_adapters(kind):
        names.append(kind)
        onto = [
            f"class Network({kind}, PeftAdapterMixin): ...  # this pipeline itself loads no adapters",
            "",
            f'pipe.transformer = Network.from_pretrained("{base}", subfolder="transformer")',
            f'pipe.transformer.load_lora_adapter("{info.name}", weight_name="{ADAPTER}", prefix="transformer")',
        ]
    return [
        "# plain diffusers, no line of ours",
        f"from diffusers import {', '.join(names)}",
        *(["from diffusers.loaders import PeftAdapterMixin"] if kind in names else []),
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
        *onto,
        f'pipe.scheduler = {scheduler}.from_pretrained("{info.name}", subfolder="scheduler")',
        f'steps = {{"num_inference_steps": {info.default_steps}, "guidance_scale": {info.guidance_scale}}}',
        'pipe("a prompt", **steps).images[0].save("sample.png")',
    ]


def _loads_adapters(network: str) -> bool:
    """Say whether the stock pipelines of a class of networks have `load_lora_weights`: PixArt's have not."""
    import diffusers

    pipelines = [name for family in FAMILIES if family.network == network for name in family.pipelines]
    return any(hasattr(getattr(diffusers, name), "load_lora_weights") for name in pipelines)


def _use_adapter(info: Info, part: str) -> list[str]:
    """Write Python that puts the adapter onto the teacher's network: diffusers' pipelines for these networks cannot."""
    if info.alone:
        return [
            "",
            f"In ComfyUI: `{COMFY}` in `models/loras`, at strength 1 on the same base, without guidance (cfg 1).",
        ]
    if not info.lora or not info.lora.base:
        return []
    kind = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}[part]
    return [
        "",
        f"The weights above are `{info.lora.base}` with a LoRA of rank {info.lora.rank} added. "
        "The LoRA alone, onto the teacher's network, with plain diffusers and `peft`:",
        "",
        "```python",
        f"from diffusers import {kind}",
        "from diffusers.loaders import PeftAdapterMixin",
        "",
        f"class Network({kind}, PeftAdapterMixin): ...",
        "",
        f'network = Network.from_pretrained("{info.lora.base}", subfolder="{part}")',
        f'network.load_lora_adapter("{info.name}", weight_name="{ADAPTER}", prefix="{part}")',
        "```",
    ]


def _limits(info: Info) -> str:
    """State the limits of the model."""
    if info.task == "sar-to-optical":
        return (
            "Colours are inferred, not measured; objects may be invented or missing. SAR input: "
            f"{info.sar}. Trained on two regions and one season: expect wrong colours elsewhere."
            + (RADIOMETRY if (info.sar or {}).get("form") == "db" else "")
        )
    if info.task == AUTOENCODER:
        return "A small network trained briefly on one kind of picture; others come back worse."
    return "A small network trained briefly; it shows the method, not the state of the art."
