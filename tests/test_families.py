"""Families of text to image: what is opened, drawn and written equals stock diffusers, on small random pipelines."""

import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from one_file import write_one_file
from stock_pipelines import PIPELINES, build

from distillers.errors import BadInput
from distillers.evaluation.candidate import evaluations
from distillers.generator import Generator, seeded_noise
from distillers.jobs.publish import adopt
from distillers.models.captions import pack
from distillers.teacher import Teacher
from distillers.training.losses import consistency_generator
from distillers.weights.read import read_info

WORDS = ["a red barn", "two small cats at sea"]
SIZE = (32, 64)  # no square, and not the published one; Sana's pipeline takes multiples of 32 alone
CLOSE = 2e-3  # of the largest pixel

TOLD_THE_SCALE = ("flux", "lcm", "lcm sdxl")

Stock = dict[str, tuple[Any, Path]]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    root = tmp_path_factory.mktemp("families")
    return {name: (build(name, root / name.replace(" ", "-")), root / name.replace(" ", "-")) for name in PIPELINES}


def theirs(pipe: Any, steps: int, **more: Any) -> np.ndarray[Any, Any]:
    """Stock diffusers, (B, H, W, C) in [0, 1], of seeds 3 and 4."""
    known = inspect.signature(type(pipe).__call__).parameters
    fixed = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    torch.manual_seed(7)
    found = pipe(
        WORDS, num_inference_steps=steps, height=SIZE[0], width=SIZE[1], output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **{**fixed, **more},
    )  # fmt: skip
    return np.asarray(found.images)


def ours(generator: Generator, steps: int, **more: Any) -> np.ndarray[Any, Any]:
    """Our generator on the same noises."""
    made = generator.sample([3, 4], **{"prompts": WORDS, "steps": steps, "size": SIZE, **more})
    return made.permute(0, 2, 3, 1).numpy() / 2 + 0.5


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "lcm"])
def test_a_teacher_draws_what_its_stock_pipeline_draws(name: str, stock: Stock) -> None:
    pipe, folder = stock[name]
    generator = Generator.from_pretrained(folder)
    assert (generator.info.task, generator.info.labels) == ("text-to-image", [])
    usual = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    assert generator.info.guidance_scale == (1 if name == "flux schnell" else usual)
    for guidance in (generator.info.guidance_scale, 2.0 if name in TOLD_THE_SCALE else 1.0):
        generator.info = replace(generator.info, guidance_scale=guidance)
        expected = theirs(pipe, 4, guidance_scale=guidance)
        made = ours(generator, 4)
        assert expected.std() > 0.02 and np.abs(made - expected).max() < CLOSE
    assert np.abs(made - ours(generator, 4, prompts=WORDS[::-1])).max() > 4 * CLOSE  # words are heard


GUIDED_BY_TWO = ("sd", "sdxl", "sd3", "pixart", "sana")


@pytest.mark.parametrize("name", GUIDED_BY_TWO)
def test_a_negative_prompt_leads_away_as_in_the_stock_pipeline(name: str, stock: Stock) -> None:
    pipe, folder = stock[name]
    generator = Generator.from_pretrained(folder)
    plain, negatives = ours(generator, 2), ["grey fog", "rain"]
    scale = generator.info.guidance_scale
    both = ours(generator, 2, negative_prompts=negatives)
    assert np.abs(both - theirs(pipe, 2, guidance_scale=scale, negative_prompt=negatives)).max() < CLOSE
    one = ours(generator, 2, negative_prompts=[None, "rain"])
    assert np.abs(one[0] - plain[0]).max() < 1e-4 and np.abs(one[1] - both[1]).max() < 1e-4
    assert np.abs(both - plain).max() > CLOSE
    with pytest.raises(BadInput, match="one text or none per image, 1"):
        generator.sample([0], prompts=["a barn"], negative_prompts=["fog", "rain"])
    generator.info = replace(generator.info, guidance_scale=1.0)
    with pytest.raises(BadInput, match=r"negative_prompt: got 'fog'.*without guidance"):
        generator.sample([0], prompts=["a barn"], negative_prompts=["fog"])


@pytest.mark.parametrize("name", ["flux", "flux schnell", "lcm", "lcm sdxl"])
def test_guidance_that_is_baked_in_leaves_no_place_for_a_negative_prompt(name: str, stock: Stock) -> None:
    generator = Generator.from_pretrained(stock[name][1])
    with pytest.raises(BadInput, match=r"negative_prompt: got 'fog'.*no pass without the prompt"):
        generator.sample([0], prompts=["a barn"], negative_prompts=["fog"])
    if name == "flux schnell":
        generator.info = replace(generator.info, guidance_scale=2.0)
        with pytest.raises(BadInput, match=r"guidance_scale: got 2.0; allowed: 1"):
            ours(generator, 1)


def test_sizes_are_those_that_a_network_knows(stock: Stock) -> None:
    for name, wrong, message in (
        ("sd3", (32, 160), "multiples of 4, 8 to 144"), ("flux", (32, 34), "multiples of 4, 8 or more"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            ours(Generator.from_pretrained(stock[name][1]), 1, size=wrong)


@pytest.mark.parametrize("name", ["sd3 without t5", "flux", "sana by dpm"])
def test_a_teacher_that_is_written_keeps_its_scheduler(name: str, stock: Stock, tmp_path: Path) -> None:
    pipe, folder = stock[name]
    generator = Generator.from_pretrained(folder)
    generator.save_pretrained(tmp_path / "again")
    left_out = {f"{part}_3": None for part in ("text_encoder", "tokenizer")} if "without t5" in name else {}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", **left_out)  # stock asks for that
    again.set_progress_bar_config(disable=True)
    kept, own = (dict(one.scheduler.config) for one in (again, pipe))
    assert {key: kept[key] for key in own if key[0] != "_"} == {key: own[key] for key in own if key[0] != "_"}
    reopened, scale = Generator.from_pretrained(tmp_path / "again"), generator.info.guidance_scale
    assert np.abs(theirs(again, 4, guidance_scale=scale) - ours(reopened, 4)).max() < CLOSE
    assert reopened.times(4, SIZE) == generator.times(4, SIZE)


@pytest.mark.parametrize("name", ["lcm", "lcm sdxl"])
def test_an_adopted_latent_consistency_model_draws_as_its_pipeline_does(
    name: str, stock: Stock, tmp_path: Path
) -> None:
    pipe, folder = stock[name]
    adopt(folder, tmp_path / "few", [4], "consistency", None)
    kept, pipe.scheduler = pipe.scheduler, diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    expected = theirs(pipe, 4)
    pipe.scheduler = kept
    assert np.abs(ours(Generator.from_pretrained(tmp_path / "few"), 4) - expected).max() < CLOSE


STUDENTS = [name for name in PIPELINES if name not in ("sd of noise", "sd3 without t5", "sana by dpm")]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_one_two_or_four_steps_leaves_as_a_pipeline_that_draws_the_same(
    name: str, stock: Stock, tmp_path: Path
) -> None:
    """Its stock scheduler visits our times without being told them, and its fresh noise is torch's own next."""
    generator = Generator.from_pretrained(stock[name][1])
    teacher = Teacher(generator.denoiser, generator.codec, generator.info)  # type: ignore[arg-type]
    guidance = generator.info.guidance_scale if name in TOLD_THE_SCALE else 1.0
    for steps in (1, 2, 4):
        made = consistency_generator(teacher.denoiser, teacher, [steps])
        made.prompts = generator.prompts
        made.save_pretrained(tmp_path / str(steps))
        again = Generator.from_pretrained(tmp_path / str(steps))
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / str(steps))
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is type(stock[name][0])
        expected = theirs(pipe, steps, guidance_scale=guidance)
        drawn = consistency_pictures(again, steps, pipe)
        assert expected.std() > 0.02 and np.abs(drawn - expected).max() < CLOSE, steps


def consistency_pictures(generator: Generator, steps: int, pipe: Any) -> np.ndarray[Any, Any]:
    """Our generator's pictures on the noise that the pipeline's scheduler draws: of the seeds, or torch's global."""
    cond = generator.encode_condition(2, size=SIZE, prompts=WORDS)
    factor, channels = generator.codec.factor, generator.codec.channels(3)
    stream = seeded_noise([3, 4], (channels, SIZE[0] // factor, SIZE[1] // factor))
    first = next(stream)
    torch.manual_seed(7)
    packed = type(pipe).__name__ == "FluxPipeline"
    handed = "generator" in inspect.getsource(type(pipe).__call__).split("scheduler.step(")[1].split(")")[0]
    handed = handed or "extra_step_kwargs" in inspect.getsource(type(pipe).__call__)

    def fresh() -> Iterator[torch.Tensor]:
        while True:
            noise = torch.randn(first.shape if not packed else pipe._pack_latents(first, *first.shape).shape)
            yield noise if not packed else pipe._unpack_latents(noise, *SIZE, factor)

    with torch.inference_mode():
        x0 = generator(first, cond, steps, stream if handed else fresh())
        return (generator.codec.decode(x0).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_checkpoint_of_one_file_draws_what_its_pipeline_draws(name: str, stock: Stock, tmp_path: Path) -> None:
    """Configurations and tokenizers come from a folder beside it; where there is none, and no hub, that is said."""
    pipe, folder = stock[name]
    write_one_file(pipe, tmp_path / "one.safetensors")
    with pytest.raises(BadInput, match=r"one.safetensors.*one/ says, a folder with model_index.json"):
        Generator.from_pretrained(tmp_path / "one.safetensors")
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors"))
    generator = Generator.from_pretrained(str(tmp_path / "one.safetensors"))
    assert generator.info.name == "one"
    assert np.abs(ours(generator, 2) - ours(Generator.from_pretrained(folder), 2)).max() < 1e-5
    Path(tmp_path / "adapter.safetensors").write_bytes(
        (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    )
    for wrong, message in (("adapter", "no network, such as an adapter"), ("torn", "readable safetensors")):
        (tmp_path / "torn.safetensors").write_bytes(b"torn")
        with pytest.raises(BadInput, match=message):
            Generator.from_pretrained(tmp_path / f"{wrong}.safetensors")


@pytest.mark.parametrize("kind", ["QwenImagePipeline", "ZImagePipeline", "Flux2Pipeline", "Lumina2Pipeline"])
def test_other_families_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "transformer": ["diffusers", "X"]}))
    with pytest.raises(BadInput, match=f"pipeline: got '{kind}'; allowed: .*StableDiffusion3Pipeline, FluxPipeline"):
        Generator.from_pretrained(tmp_path)


def test_networks_are_told_the_size_of_the_pictures_that_they_learn_from(stock: Stock) -> None:
    teacher = Teacher.from_pretrained(stock["sdxl"][1])
    captions = pack(WORDS)
    assert (
        teacher.encode_batch({"image": torch.zeros(2, 3, 16, 24), "caption": captions}, "cpu")["ids"].tolist()
        == [[16, 24, 0, 0, 16, 24]] * 2
    )
    latents = {"latent": torch.zeros(2, 4, 6, 8), "size": torch.tensor([[12, 16]] * 2), "caption": captions}
    assert teacher.encode_batch(latents, "cpu")["ids"].tolist() == [[12, 16, 0, 0, 12, 16]] * 2


@pytest.mark.parametrize(("name", "tokens"), [("sd3", 16), ("flux", 16), ("pixart", 16), ("sana", 64)])
def test_the_middle_of_a_transformer_is_the_pictures_tokens(name: str, tokens: int, stock: Stock) -> None:
    """Blocks of SD3 and FLUX.1 return the words' tokens, too, which are no features of the picture."""
    generator = Generator.from_pretrained(stock[name][1])
    cond = generator.encode_condition(2, size=(16, 16), prompts=WORDS)
    x_t = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        (found,) = generator.denoiser.features(x_t, torch.tensor(0.5), cond)  # type: ignore[operator]
        (other,) = generator.denoiser.features(x_t + 1, torch.tensor(0.5), cond)  # type: ignore[operator]
    assert found.shape[:2] == (2, tokens) and not torch.equal(found, other)


@pytest.mark.parametrize(("name", "passes"), [("sd", 2), ("sd3", 2), ("flux", 1), ("flux schnell", 1), ("lcm", 1)])
def test_guidance_that_is_an_input_costs_no_second_pass(name: str, passes: int, stock: Stock) -> None:
    generator = Generator.from_pretrained(stock[name][1])
    called = 0

    def count(*_: object) -> None:
        nonlocal called
        called += 1

    generator.denoiser.network.register_forward_pre_hook(lambda net, given, named: count(), with_kwargs=True)
    sizes: list[int] = []
    generator.denoiser.register_forward_pre_hook(lambda net, given: sizes.append(len(given[0])))
    ours(generator, 3)
    assert called == 3 and sizes == [2 * passes] * 3  # both sides of guidance go as one batch
    assert evaluations(generator, 3) == 3 * passes
    generator.info = replace(generator.info, guidance_scale=1.0)
    assert evaluations(generator, 3) == 3


def test_a_transformer_opens_under_its_old_name(stock: Stock, tmp_path: Path) -> None:
    """PixArt-Alpha was published as a `Transformer2DModel`; its 1000 times are no classes."""
    folder = shutil.copytree(stock["pixart"][1], tmp_path / "old")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert type(Generator.from_pretrained(folder).denoiser.network).__name__ == "PixArtTransformer2DModel"
    assert (read_info(folder).task, read_info(folder).labels) == ("text-to-image", [])
