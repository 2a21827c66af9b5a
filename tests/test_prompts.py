"""Text to image, on small Stable Diffusion and SDXL pipelines of diffusers' own classes with random weights."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from service import until_ready
from starlette.testclient import TestClient
from typer.testing import CliRunner
from untrained_pipelines import BETAS, tokenizer

from app.engine import tuning
from app.engine.model import Model
from app.main import create_app
from app.settings import Settings
from distillers.cli import app as cli
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.publish import adopt
from distillers.models.codec import Vae
from distillers.weights.read import read_autoencoder

WORDS = ["a red barn", "two small cats at sea"]
SIDE, WIDTH = 16, 32


def encoder(kind: type[Any], act: str) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=20, projection_dim=24, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        hidden_act=act,
    )  # fmt: skip
    return kind(config).eval()


def pipeline(folder: Path, xl: bool, **statistics: Any) -> Any:
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH * (2 if xl else 1), **more,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **statistics,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, "feature_extractor": None}
    parts["tokenizer"] = tokenizer(folder / "words", 20)
    parts["text_encoder"] = encoder(transformers.CLIPTextModel, "quick_gelu")
    if xl:
        parts["tokenizer_2"] = tokenizer(folder / "words_2", 20)
        parts["text_encoder_2"] = encoder(transformers.CLIPTextModelWithProjection, "gelu")
        made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    made.save_pretrained(folder / "pipeline")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=["sd", "xl"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return pipeline(folder, request.param == "xl"), folder / "pipeline"


def drawn_by(
    pipe: Any, seeds: list[int], steps: int, guidance: float, words: list[str] = WORDS
) -> np.ndarray[Any, Any]:
    """Stock diffusers, on the same noises."""
    found = pipe(
        words, num_inference_steps=steps, guidance_scale=guidance, height=SIDE, width=SIDE, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )  # fmt: skip
    return np.asarray(found.images)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_draws_what_stock_diffusers_draws(stock: tuple[Any, Path], guidance: float, steps: int) -> None:
    pipe, folder = stock
    generator = Generator.from_pretrained(folder)
    assert generator.info.task == "text-to-image" and generator.info.guidance_scale in (5.0, 7.5)
    generator.info = replace(generator.info, guidance_scale=guidance)
    own = generator.sample([3, 4], prompts=WORDS, steps=steps).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    theirs = drawn_by(pipe, [3, 4], steps, guidance)
    assert theirs.std() > 0.05 and np.abs(own - theirs).max() < 2e-3
    other = generator.sample([3, 4], prompts=WORDS[::-1], steps=steps).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert np.abs(own - other).max() > 1e-3  # words are heard


@pytest.mark.parametrize("key", [None, True, False], ids=["no key", "zeros", "encoded"])
def test_an_empty_prompt_is_drawn_as_stock_diffusers_draws_it(
    key: bool | None, stock: tuple[Any, Path], tmp_path: Path
) -> None:
    """SDXL's zeros are for the side of guidance without a prompt, and are the default; not for an empty prompt."""
    folder = shutil.copytree(stock[1], tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("force_zeros_for_empty_prompt", None)
    if key is not None and "text_encoder_2" in index:
        index["force_zeros_for_empty_prompt"] = key
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = Generator.from_pretrained(folder)
    generator.info = replace(generator.info, guidance_scale=5.0)
    own = generator.sample([3, 4], prompts=["", WORDS[0]], steps=2).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert np.abs(own - drawn_by(pipe, [3, 4], 2, 5.0, ["", WORDS[0]])).max() < 1e-3


STATISTICS = {"latents_mean": [-1.6, 1.1, 0.5, -0.8], "latents_std": [8.4, 5.9, 5.1, 6.1], "scaling_factor": 0.5}


def test_statistics_of_latents_are_read_where_stock_diffusers_reads_them(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path / "xl", True, **STATISTICS)
    generator = Generator.from_pretrained(tmp_path / "xl" / "pipeline")
    own = generator.sample([3, 4], prompts=WORDS, steps=2).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert np.abs(own - drawn_by(pipe, [3, 4], 2, 5.0)).max() < 1e-3
    codec: Any = generator.codec
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        pixels = codec.vae.decode(latents).sample
        encoded = codec.vae.encode(pixels).latent_dist.mean
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(codec.encode(pixels), (encoded - mean) * 0.5 / std)

    pipeline(tmp_path / "sd", False, **STATISTICS)
    for read, name in ((Generator.from_pretrained, "sd"), (read_autoencoder, "xl")):  # of a model of its own
        with pytest.raises(BadInput, match=r"latents_mean: got \[-1.6"):
            read(tmp_path / name / "pipeline")  # type: ignore[operator]
    for wrong in ({"latents_std": [1.0] * 4}, {"latents_mean": [0.0] * 4}, {**STATISTICS, "latents_std": [1, 1, 1, 0]}):
        vae: Any = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **wrong)
        with pytest.raises(BadInput, match=r"latents_mean, latents_std.*4 of each"):
            Vae(vae)


def test_an_autoencoder_that_half_precision_does_not_suit_stays_single(stock: tuple[Any, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stock[1], tmp_path / "copy")
    config = json.loads((folder / "vae" / "config.json").read_text())
    for upcast, dtype in ((True, torch.float32), (False, torch.float16), (None, torch.float32)):
        kept = {k: v for k, v in config.items() if k != "force_upcast"}
        (folder / "vae" / "config.json").write_text(
            json.dumps(kept | ({} if upcast is None else {"force_upcast": upcast}))
        )
        generator = Generator.from_pretrained(folder, dtype=torch.float16)
        codec: Any = generator.codec
        assert (codec.vae.dtype, next(generator.denoiser.parameters()).dtype) == (dtype, torch.float16)
    assert Generator.from_pretrained(folder, dtype=torch.bfloat16).codec.vae.dtype == torch.bfloat16  # type: ignore[attr-defined]


def test_an_adopted_folder_is_a_student_that_stock_diffusers_still_opens(
    stock: tuple[Any, Path], tmp_path: Path
) -> None:
    pipe, folder = stock
    done = CliRunner().invoke(cli, ["adopt", str(folder), str(tmp_path / "few"), "--steps", "1,4"])
    assert done.exit_code == 0, done.output
    generator = Generator.from_pretrained(tmp_path / "few")
    assert generator.info.role == "student" and sorted(generator.info.step_times) == [1, 4]
    assert generator.info.guidance_scale == 1
    own = generator.sample([3, 4], prompts=WORDS, steps=1)
    assert float((own - Generator.from_pretrained(folder).sample([3, 4], prompts=WORDS, steps=1)).abs().max()) > 0
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "few")  # plainly: all parts at one precision
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    theirs = drawn_by(again, [3, 4], 1, 1.0)
    assert np.abs(own.permute(0, 2, 3, 1).numpy() / 2 + 0.5 - theirs).max() < 2e-3
    (tmp_path / "few" / "text_encoder" / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="sha256"):
        Generator.from_pretrained(tmp_path / "few")


def test_what_is_wrong_is_named(stock: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = stock
    generator = Generator.from_pretrained(folder)
    for prompts, message in ((None, "one text per image"), (["one"], "one text"), (["a", "b" * 3000], "2000")):
        with pytest.raises(BadInput, match=message):
            generator.sample([0, 1], prompts=prompts)
    with pytest.raises(BadInput, match="takes no class"):
        generator.sample([0], labels=[0], prompts=["a"])
    for sampler, steps in (("euler", [1]), ("consistency", [51])):
        with pytest.raises(BadInput, match=r"sampler|steps"):
            adopt(folder, tmp_path / "out", steps, sampler, None)


def test_the_command_leads_away_and_draws_other_shapes(stock: tuple[Any, Path], tmp_path: Path) -> None:
    asked = ["generate", str(stock[1]), "--prompt", "a barn", "--steps", "2", "--out", str(tmp_path / "x.npy")]
    for more, size, negative in (
        (["--size", "24x16"], (16, 24), None), (["--negative-prompt", "fog"], (SIDE, SIDE), ["fog"]),
    ):  # fmt: skip
        done = CliRunner().invoke(cli, [*asked, *more])
        assert done.exit_code == 0, done.output
        drawn = Generator.from_pretrained(stock[1]).sample(
            [0], prompts=["a barn"], negative_prompts=negative, steps=2, size=size
        )
        assert np.abs(np.load(tmp_path / "x.npy") - drawn.numpy()).max() < 1e-5
    for wrong in ("24", "24x17", "axb"):
        refused = CliRunner().invoke(cli, [*asked, "--size", wrong])
        assert isinstance(refused.exception, BadInput) and refused.exception.field == "size"


@pytest.mark.slow
def test_backends_run_words_network_and_decoder(stock: tuple[Any, Path], tmp_path: Path) -> None:
    adopt(stock[1], tmp_path / "few", [1], "consistency", None)
    model = Model.open("few", tmp_path / "few", "cpu", 250)
    assert len(model.dispatches) == 2 + len(model.generator.prompts.encoders)  # type: ignore[union-attr]
    pytest.importorskip("openvino")
    profile = tuning.tune(model, lambda work: work(), seconds=50, tolerance=2, largest=2)
    ran = {entry["backend"].partition("/")[0] for entry in profile.tried if "ms" in entry}
    assert {"eager", "channels-last", "openvino"} <= ran, profile.tried
    probes = model.probes(2)
    together = model.draw(1, probes)
    alone = np.concatenate([model.draw(1, [probe], strict=True) for probe in probes])
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 2
    assert all(not dispatch.unprepared for dispatch in model.dispatches) or 2 not in profile.buckets


def test_a_prompt_is_drawn_over_http(stock: tuple[Any, Path], tmp_path: Path) -> None:
    adopt(stock[1], tmp_path / "weights" / "few", [1, 2], "consistency", None)
    service = create_app(Settings(weights=tmp_path / "weights", device="cpu", tune_seconds=0))
    with TestClient(service, raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        assert client.get("/v1/models/few").json()["reads_text"] is True

        def ask(status: int = 200, path: str = "/v1/images/generations", **body: Any) -> Any:
            answer = client.post(path, json={"seed": 3, **body})
            assert answer.status_code == status, answer.text
            return answer.json()

        def pixels(answer: Any) -> Any:
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))

        barn = pixels(ask(prompt=WORDS[0]))
        expected = Generator.from_pretrained(tmp_path / "weights" / "few").sample([3], prompts=[WORDS[0]], steps=1)
        levels = ((expected[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
        assert barn.shape == (SIDE, SIDE, 3) and np.abs(barn - levels).max() <= 1
        assert (pixels(ask(prompt=WORDS[1])) != barn).any() and (pixels(ask(prompt=WORDS[0], steps=2)) != barn).any()
        assert ask(prompt="a" * 18)["unread"] is None
        assert ask(prompt="a" * 18 + "bcd")["unread"]["text_encoder"] == "bcd"
        raw = client.post("/v1/images/generations", json={"prompt": "a" * 18 + "bé"}, headers={"Accept": "image/png"})
        assert raw.status_code == 200 and json.loads(unquote(raw.headers["x-fewstep-unread"]))["text_encoder"]
        wide = Generator.from_pretrained(tmp_path / "weights" / "few").sample([3], prompts=["a"], steps=1, size=(8, 32))
        levels = ((wide[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
        assert np.abs(pixels(ask(prompt="a", size="32x8")) - levels).max() <= 1
        for size in ("32x16", "31x8", "8", "wide"):  # too many pixels, no multiple, no size
            assert ask(400, prompt="a", size=size)["error"]["param"] == "size"
        assert ask(400, prompt="a", negative_prompt="b")["error"]["param"] == "negative_prompt"  # a student
        assert ask(400, prompt="a", label=1)["error"]["param"] == "label"
        assert ask(400, prompt="b" * 2001)["error"]["param"] == "prompt"
        start = io.BytesIO()
        Image.fromarray(barn).save(start, "PNG")
        edited = client.post(
            "/v1/images/edits", files={"image": start.getvalue()}, data={"prompt": WORDS[1], "seed": "3", "steps": "2"}
        )
        assert edited.status_code == 200, edited.text
