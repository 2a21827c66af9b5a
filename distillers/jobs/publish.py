"""What turns a trained generator into a published folder: weights, recipe, picture, card.

The card is written from the manifest, the recipe and the report alone, so that every number on it was measured.
"""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from distillers.autoencoder import Autoencoder
from distillers.data import ImageData, Part, open_data
from distillers.errors import BadInput
from distillers.evaluation.pictures import grey_sar, grid_png, side_by_side
from distillers.evaluation.self_check import write_golden
from distillers.generator import Generator
from distillers.jobs.recipe import Recipe
from distillers.models.radiometry import Radiometry
from distillers.models.schedule import VariancePreserving
from distillers.weights.manifest import ADAPTER, AUTOENCODER, SAMPLERS, STUDENTS, Info, find
from distillers.weights.network import guided
from distillers.weights.write import lcm_times, staged

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
COLUMNS = 10  # of grid.png


def publish(
    generator: Generator | Autoencoder,
    recipe: Recipe,
    data: ImageData | None,
    folder: Path,
    *,
    iteration: int | None = None,
) -> None:
    """Write the folder beside, then in its place; `fewstep.json` comes last, so a folder that is found is whole.

    iteration: where the training stood, if it had not ended; the recipe and the card say so.
    """
    with staged(folder) as new:
        stood = {} if iteration is None else {"iteration": iteration}
        (new / "recipe.toml").write_text(tomli_w.dumps({**recipe.table(), "versions": versions() | stood}))
        teacher = Generator.from_pretrained(recipe.teacher) if recipe.teacher else None
        generator.save_pretrained(new)
        if isinstance(generator, Autoencoder):
            if data is not None:
                reconstructions(generator, recipe, data, new / "grid.png")
            write_card(new)
            return
        seen = held_out(new)[0] if generator.info.task == "sar-to-optical" else data
        picture(generator, teacher, seen, new)
        write_golden(generator, new)
        write_card(new)


def adopt(pipeline: str | Path, folder: Path, steps: Sequence[int], sampler: str, guidance: float | None) -> str:
    """Makes a folder that can be served out of a pipeline that others have trained; says what it draws.

    Args:
        steps: a few-step model's, at the times where stock schedulers take them; empty: a teacher, any number.
        sampler: of a few-step model: "consistency" or "ddim".
        guidance: None: 1 for a few-step model, else the pipeline's own.
    """
    generator = Generator.from_pretrained(pipeline)
    if sampler not in SAMPLERS:
        raise BadInput("sampler", sampler, ", ".join(SAMPLERS))
    info = replace(generator.info, name=folder.name, sha256={})
    if steps:
        lcm = sampler == "consistency" and isinstance(generator.schedule, VariancePreserving)
        times = {n: lcm_times(generator.schedule, n) if lcm else generator.times(n) for n in steps}  # type: ignore[arg-type]
        told = {"role": "student", "method": "adopted", "sampler": sampler, "guidance_scale": 1.0}
        info = replace(info, **told, step_times=times, default_steps=min(steps))  # type: ignore[arg-type]
    generator.info = info if guidance is None else replace(info, guidance_scale=guidance)
    guided(generator.denoiser, generator.info, generator.info.guidance_scale)  # refused here, not when served
    generator.save_pretrained(folder)
    height, width = info.size
    return f"{info.task}, {width}x{height}, " + (f"steps {', '.join(map(str, steps))}" if steps else "any steps")


def held_out(folder: Path, path: Path | None = None) -> tuple[ImageData, ImageData]:
    """The test and train split of what a folder was trained on, by its recipe; `path`: where the data stand now.

    Of a student of some classes: their items.
    """
    if not (folder / "recipe.toml").is_file():
        raise BadInput("weights", str(folder), "a folder with a recipe.toml, which says what data it was trained on")
    test, train = splits(Recipe.load(folder / "recipe.toml"), path)
    info = Info.read(folder)
    if len(info.classes) == len(info.labels):
        return test, train
    names = [test.labels[label] for label in info.classes]
    return Part(test, names), Part(train, names)


def splits(recipe: Recipe, path: Path | None = None) -> tuple[ImageData, ImageData]:
    """The test and the train split of a recipe's data."""
    options = dict(recipe.data)
    if path is not None:
        options["path"] = str(path)
    kind = options.pop("kind", "images")
    return open_data(kind, **{**options, "split": "test"}), open_data(kind, **{**options, "split": "train"})


def versions() -> dict[str, Any]:
    """What the recipe was run with."""
    packages = ("fewstep", "torch", "diffusers", "accelerate", "peft", "numpy")
    found = {name: metadata.version(name) for name in packages if _installed(name)}
    return {"python": platform.python_version(), **found}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def picture(generator: Generator, teacher: Generator | None, data: ImageData | None, folder: Path) -> None:
    """grid.png: a row for every step count, the teacher above on the same noises and conditions.

    For translators the columns are held-out SAR tiles, which also go to examples/*.png, ready to send.
    """
    models = [model for model in (teacher, generator) if model is not None]
    draw_rows({_row(model, k): (model, k) for model in models for k in _shown(model)}, data, folder / "grid.png")
    if generator.info.task == "sar-to-optical" and data is not None:
        seen = Radiometry.of(generator.info.sar)
        for i, sar in enumerate(data.items(_columns(data))["sar"]):
            grey, band = seen.as_picture(sar.numpy())
            name = f"{i}-{band}.png" if band else f"{i}.png"
            grid_png(torch.from_numpy(grey)[None, None] * 2 - 1, columns=1, path=folder / "examples" / name, gap=0)


def reconstructions(autoencoder: Autoencoder, recipe: Recipe, data: ImageData, path: Path) -> None:
    """A PNG of originals above their reconstructions, from the held-out split where the data have one."""
    try:
        data, name = splits(recipe)[0], "originals, held out"
    except BadInput:
        name = "originals, learnt from"
    originals = data.items(_columns(data))["image"]
    rows = {name: originals, "reconstructions": autoencoder.reconstruct(originals)}
    side_by_side(rows, path, zoom=max(1, 96 // originals.shape[-1]))


def draw_rows(models: Mapping[str, tuple[Generator, int]], data: ImageData | None, path: Path) -> None:
    """A PNG with a labelled row for each (model, steps), on the same noises and conditions; SAR above, truth below.

    data: where translators take their SAR from; nobody else looks at them.
    """
    info = list(models.values())[-1][0].info
    condition: dict[str, Any] = {}
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    if info.task == "sar-to-optical" and data is not None:
        batch = data.items(_columns(data))
        condition = {"sar": batch["sar"]}
        above, below = {"SAR": grey_sar(batch["sar"], info.sar)}, {"optical, the truth": batch["image"]}
    elif info.task == "class-to-image":
        classes = info.classes
        condition = {"labels": [classes[i * len(classes) // COLUMNS] for i in range(COLUMNS)]}
    made = {row: model.sample(range(COLUMNS), steps=k, **condition) for row, (model, k) in models.items()}
    side_by_side({**above, **made, **below}, path, zoom=max(1, 96 // info.size[0]))


def _columns(data: ImageData) -> list[int]:
    return [i * len(data) // COLUMNS for i in range(COLUMNS)]


def _row(generator: Generator, steps: int) -> str:
    return f"{generator.info.role}, {steps} step{'s' * (steps > 1)}"


def _shown(generator: Generator) -> list[int]:
    return sorted(generator.info.step_times) or [generator.info.default_steps]


def results(root: Path) -> str:
    """One Markdown table of all reports below root, each figure as its report.json has it."""
    lines = ["| folder | row | NFE | Frechet | KID x1000 | PSNR | p50 ms | n |", "|---|---|---|---|---|---|---|---|"]
    for name, folder in find(root).items():
        if not (folder / "report.json").is_file():
            continue
        for row in json.loads((folder / "report.json").read_text())["rows"]:
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


def _figure(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def write_card(folder: Path) -> None:
    """README.md from fewstep.json, recipe.toml and, once measured, report.json."""
    info = Info.read(folder)
    recipe = (folder / "recipe.toml").read_text() if (folder / "recipe.toml").is_file() else ""
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else None
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
        *_use(info, (folder / "model_index.json").is_file()),
        "```",
        *_use_adapter(info, "transformer" if (folder / "transformer").is_dir() else "unet"),
        "",
        "## Measured",
        "",
        report["markdown"]
        if report and "markdown" in report
        else "Not measured yet: `fewstep evaluate` writes this part.",
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
    table = tomllib.loads(recipe)
    if not (iteration := table.get("versions", {}).get("iteration")):
        return ""
    return f", published at iteration {iteration} of {table['train']['iterations']}"


def _calibration(folder: Path) -> list[str]:
    """Whether the deviation of samples is worth anything, where that was measured."""
    if not (folder / "calibration.json").is_file():
        return []
    lines = [json.loads((folder / "calibration.json").read_text())["markdown"], "![calibration](calibration.png)", ""]
    return [*lines, "![tiles](report-tiles.png)", ""] if (folder / "report-tiles.png").is_file() else lines


def _what(info: Info) -> str:
    kind = {
        "image": "pictures",
        "class-to-image": f"pictures of {len(info.classes)} classes",
        "sar-to-optical": "optical from SAR",
        "text-to-image": "pictures of what a text says",
    }
    size = "x".join(map(str, info.size))
    if info.task == AUTOENCODER:
        side = "x".join(str(n // info.patch) for n in info.size)
        looked = f" Its loss compared the features of {', '.join(info.trained_with)}." if info.trained_with else ""
        return (
            f"An autoencoder: pictures of {size} px to latents of {side} positions and back. It draws nothing by "
            f"itself; a diffusion model trains in its latents.{looked}"
        )
    if info.role == "teacher":
        return f"A diffusion teacher: {kind[info.task]}, {size} px, {info.default_steps} steps by default."
    counts = ", ".join(map(str, sorted(info.step_times)))
    what = f"A {info.method} student of `{info.teacher}`: {kind[info.task]}, {size} px, in {counts} steps."
    if len(info.shares) == 1:
        return f"{what} It is one of several, and draws only: {_names(info, info.shares[0])}."
    drawn = (f" `{STUDENTS}/{k}` draws {_names(info, share)}." for k, share in enumerate(info.shares))
    return what + "".join(drawn)


def _names(info: Info, share: Sequence[int]) -> str:
    return ", ".join(info.labels[label] for label in share)


def _use(info: Info, stock: bool) -> list[str]:
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
        labels = f", class_labels={label}" if info.task == "class-to-image" else ""
        if info.codec == "vae":  # DiTPipeline wants a list, and guides by 4 unless told otherwise
            labels = f", class_labels=[{label}], guidance_scale={info.guidance_scale}"
        return [
            "# plain diffusers, no line of ours",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{info.name}")',
            f'pipe(num_inference_steps={info.default_steps}{labels}).images[0].save("sample.png")',
        ]
    patch = f"; pixels are `pixel_shuffle(x0, {info.patch})`" if info.patch > 1 else ""
    if info.codec == "vae":
        patch = "; pixels are `vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample`"
    parts = f"each folder in {STUDENTS}/" if len(info.shares) > 1 else "UNet2DModel"
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
    return [*lines, "", f'pixels = Generator.from_pretrained("{info.name}").sample([0]{labels})']


def _use_adapter(info: Info, part: str) -> list[str]:
    """How stock diffusers puts the adapter onto the teacher's network. Its pipelines for these networks cannot."""
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
    if info.task == "sar-to-optical":
        return (
            "Colours are inferred, not measured; objects may be invented or missing. SAR input: "
            f"{info.sar}. Trained on two regions and one season: expect wrong colours elsewhere."
            + (RADIOMETRY if (info.sar or {}).get("form") == "db" else "")
        )
    if info.task == AUTOENCODER:
        return "A small network trained briefly on one kind of picture; others come back worse."
    return "A small network trained briefly; it shows the method, not the state of the art."
