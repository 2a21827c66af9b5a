"""The service with adapter folders: on their base, sharing its weights, beside styles, and what is refused."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from service import GENERATE, engine_held, engine_of, error_of, pictures, until, until_ready, wait_until_waiting
from starlette.testclient import TestClient
from stock_pipelines import build
from test_adapter_folders import student
from test_families import CLOSE

from app.engine.backends import _nhwc, candidates, eager
from app.engine.model import Model
from app.main import create_app
from app.settings import Settings
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.publish import adopt
from distillers.models.lora import lora_state, set_lora_scale
from distillers.weights.manifest import ADAPTER
from distillers.weights.read import Bases

STEPS = (1, 2, 4)
KIND = diffusers.StableDiffusionPipeline


def adapter(base: Path, name: str, factor: float = 1) -> None:
    """A folder beside the base of an adapter of it, all of whose weights are multiplied."""
    made = student(base, *STEPS)
    made.info = replace(made.info, name=name)
    with torch.no_grad():
        for parameter in made.denoiser.network.parameters():
            parameter.mul_(factor)
    made.save_pretrained(base.with_name(name))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion as a stock folder, not served, and two adapters of it; a third without its base."""
    root = tmp_path_factory.mktemp("weights")
    build("sd", root / "base")
    adapter(root / "base", "one")
    adapter(root / "base", "other", -1.2)
    shutil.copytree(root / "one", root / "orphan")
    manifest = json.loads((root / "orphan" / "fewstep.json").read_text())
    manifest["lora"]["base"] = "gone"
    (root / "orphan" / "fewstep.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[TestClient]:
    settings = Settings(weights=weights, device="cpu", tune_seconds=0, rescan_seconds=0.05)
    with TestClient(create_app(settings)) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def stock(root: Path, name: str) -> Any:
    """The stock pipeline with the adapter."""
    pipe = KIND.from_pretrained(root / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(root / name / "scheduler")
    pipe.load_lora_weights(root / name, adapter_name="student")
    return pipe


def stock_picture(pipe: Any, steps: int, prompt: str = "a red barn", seed: int = 3) -> np.ndarray[Any, Any]:
    given: Any = {"generator": torch.Generator().manual_seed(seed), "height": 16, "width": 16, "output_type": "np"}
    found: np.ndarray[Any, Any] = pipe(prompt, num_inference_steps=steps, guidance_scale=1.0, **given).images[0]
    return found


def asked(client: TestClient, model: str, steps: int, **more: Any) -> Any:
    body = {"model": model, "prompt": "a red barn", "seed": 3, "steps": steps, **more}
    return client.post(GENERATE, json=body)


@pytest.mark.parametrize("steps", STEPS)
def test_an_adapter_on_a_shared_base_draws_what_stock_diffusers_draws(
    weights: Path, client: TestClient, steps: int
) -> None:
    for name in ("one", "other"):
        pipe = stock(weights, name)
        theirs = stock_picture(pipe, steps)
        (served,) = pictures(asked(client, name, steps))
        assert np.abs(served / 255 - theirs).max() < CLOSE + 0.5 / 255
        exact = engine_of(client).models[name].generator.sample([3], prompts=["a red barn"], steps=steps)
        assert np.abs(exact[0].permute(1, 2, 0).numpy() / 2 + 0.5 - theirs).max() < CLOSE
        pipe.set_adapters(["student"], [0.0])
        assert np.abs(stock_picture(pipe, steps) - theirs).max() > 10 * CLOSE


def test_adapters_of_one_base_hold_one_copy_of_its_weights(weights: Path, client: TestClient) -> None:
    one, other = (engine_of(client).models[name] for name in ("one", "other"))
    places = [{p.data_ptr(): p.nbytes for p in model.generator.parameters()} for model in (one, other)]
    adapter = sum(value.nbytes for value in load_file(weights / "one" / ADAPTER).values()) * 2  # in float32
    base = sum(p.nbytes for p in Generator.from_pretrained(weights / "base").parameters())
    assert sum((places[0] | places[1]).values()) == base + 2 * adapter
    assert engine_of(client).store._held() == base + 2 * adapter
    assert sum(places[0].values()) == base + adapter == one.bytes


def test_a_batch_never_mixes_adapters_and_each_draws_its_own_pictures(client: TestClient) -> None:
    names = ["one", "other", "one", "other"]
    alone = {name: pictures(asked(client, name, 1))[0] for name in names}
    turns = engine_of(client).workers[0].turns
    assert client.portal is not None
    with engine_held(client):
        waiting = [client.portal.start_task_soon(_ask, client, name) for name in names]
        wait_until_waiting(client, 4)
    found = [future.result() for future in waiting]
    assert engine_of(client).workers[0].turns == turns + 2
    for name, picture in zip(names, found, strict=True):
        assert np.abs(picture.astype(int) - alone[name]).max() <= 1
    assert np.abs(alone["one"] - alone["other"]).max() > 10


async def _ask(client: TestClient, name: str) -> Any:
    from app.engine.engine import Order

    engine = engine_of(client)
    (picture,) = await engine.draw(engine.models[name], 1, [Order(3, prompt="a red barn")], 16, 16)
    return picture.pixels


def test_a_base_that_is_missing_is_named_and_the_adapter_opens_when_it_comes(weights: Path, client: TestClient) -> None:
    assert engine_of(client).failed == ["orphan"] and set(engine_of(client).models) == {"one", "other"}
    with pytest.raises(BadInput, match="orphan: base: got 'gone'"):
        engine_of(client).store.load("orphan").result()
    (weights / "gone").symlink_to(weights / "base")
    try:
        until(lambda: "orphan" in engine_of(client).models)
        mine, own = (pictures(asked(client, name, 1))[0] for name in ("orphan", "one"))
        assert np.array_equal(mine, own)
        # a link to the same folder is the same base
        assert engine_of(client).models["orphan"].generator.base is engine_of(client).models["one"].generator.base
    finally:
        (weights / "gone").unlink()


def test_another_base_is_refused_and_both_are_named(weights: Path, client: TestClient) -> None:
    shutil.copytree(weights / "one", weights / "wrong")
    path = weights / "wrong" / "fewstep.json"
    manifest = json.loads(path.read_text())
    manifest["lora"]["sha256"] = 64 * "0"
    path.write_text(json.dumps(manifest))
    try:
        until(lambda: "wrong" in engine_of(client).failed)
        with pytest.raises(BadInput, match=r"base, whose network.*the base of one, with sha256 000000000000"):
            engine_of(client).store.load("wrong").result()
        assert pictures(asked(client, "one", 1))
    finally:
        shutil.rmtree(weights / "wrong")


def test_the_copies_of_backends_are_shared_too_and_go_when_nobody_has_them(weights: Path) -> None:
    bases = Bases()
    generators = [Generator.from_pretrained(weights / name, bases=bases) for name in ("one", "other")]
    networks = [generator.denoiser.network for generator in generators]
    for dtype in (None, torch.bfloat16):
        copies = [_nhwc(network, dtype) for network in networks]
        own, copied = ([{p.data_ptr() for p in one.parameters()} for one in many] for many in (networks, copies))
        assert len(own[0] & own[1]) == len(copied[0] & copied[1]) > 50
        assert {p.dtype for p in copies[0].parameters()} == {dtype or torch.float32}
        gone = weakref.ref(next(copies[0].parameters()))
        del copies
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("backend", ["channels-last", "openvino"])
def test_a_backend_with_its_own_copy_draws_the_adapters_pictures(weights: Path, backend: str) -> None:
    model = Model.open("one", weights / "one", "cpu", 10, Bases())
    found = next((one for one in candidates("cpu", slow=False) if one.name == backend), None)
    if found is None:
        pytest.skip("OpenVINO is not installed")
    network = model.networks[0]
    (inputs,) = model.inputs(2, 0)
    with torch.inference_mode():
        expected = eager(network)(inputs)(*inputs)
        assert (found.open(network)(inputs)(*inputs) - expected).abs().max() < 1e-4
        set_lora_scale(network, 0)
        assert (eager(network)(inputs)(*inputs) - expected).abs().max() > 1e-2


# --- styles


@pytest.fixture(scope="module")
def styled(weights: Path) -> Iterator[tuple[TestClient, Path]]:
    """A server with two styles, of which one changes the text encoder too; a LoRA of SDXL, and a file that is none."""
    loras = weights.parent / "loras"
    loras.mkdir(exist_ok=True)
    pipe = KIND.from_pretrained(weights / "base", safety_checker=None)
    for name, only in (("ink", "attn"), ("oil", "conv")):
        state = lora_state(student(weights / "base", 1).denoiser.network)
        torch.manual_seed(len(name) + ord(name[0]))
        kept = {k: torch.randn_like(v) * 0.05 for k, v in state.items() if only in k}
        if name == "ink":
            for part in ("self_attn.q_proj", "mlp.fc2"):
                layer = pipe.text_encoder.get_submodule(f"encoder.layers.0.{part}")
                key = f"text_encoder.encoder.layers.0.{part}"
                kept[f"{key}.lora_A.weight"] = torch.randn(2, layer.in_features) * 0.3
                kept[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, 2) * 0.3
        save_file(kept, loras / f"{name}.safetensors")
    wide = {k: torch.zeros(*v.shape[:1], 7) if "to_k.lora_A" in k else v for k, v in kept.items()}
    wide["unet.conv_in.lora_A.weight"] = torch.zeros(4, 9, 3, 3)
    save_file(wide, loras / "of-another-base.safetensors")
    (loras / "broken.safetensors").write_bytes(b"no file")
    settings = Settings(weights=weights, device="cpu", tune_seconds=0, loras=loras)
    with TestClient(create_app(settings)) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client, loras


@pytest.mark.parametrize(
    "asked_for", [[("ink", 0.8)], [("oil", -0.5)], [("oil", 1.0), ("ink", 0.5)]], ids=["ink", "oil", "both"]
)
def test_styles_on_a_student_are_what_set_adapters_makes_of_them(
    styled: tuple[TestClient, Path], weights: Path, asked_for: list[tuple[str, float]]
) -> None:
    client, loras = styled
    pipe = stock(weights, "one")
    for name, _ in asked_for:
        pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=name)
    body = [{"name": name, "weight": weight} for name, weight in asked_for]
    for steps in (1, 4):
        pipe.set_adapters(["student", *(n for n, _ in asked_for)], [1.0, *(w for _, w in asked_for)])
        theirs = stock_picture(pipe, steps)
        answer = asked(client, "one", steps, loras=body)
        (served,) = pictures(answer)
        assert np.abs(served / 255 - theirs).max() < CLOSE + 0.5 / 255
        assert sorted(lora["name"] for lora in answer.json()["loras"]) == sorted(name for name, _ in asked_for)
        (bare,) = pictures(asked(client, "one", steps))
        pipe.set_adapters(["student"], [1.0])
        assert np.abs(bare / 255 - stock_picture(pipe, steps)).max() < CLOSE + 0.5 / 255, "it is gone again"
        assert np.abs(served - bare).max() > 10


def test_pictures_of_other_weights_are_no_batch_and_weights_hold_no_memory(styled: tuple[TestClient, Path]) -> None:
    client, folder = styled
    worker = engine_of(client).workers[0]
    for weight in (0.25, 0.5, 0.75):
        assert asked(client, "one", 1, loras=[{"name": "oil", "weight": weight}]).status_code == 200
    costs = len(worker._costs)
    assert asked(client, "one", 1, loras=[{"name": "oil", "weight": 0.125}]).status_code == 200
    assert len(worker._costs) == costs
    model = engine_of(client).models["one"]
    one, other = (model.style([folder / f"{name}.safetensors"]) for name in ("oil", "ink"))
    assert one.networks[0] is not None
    own, with_style = ({p.data_ptr() for p in net.parameters()} for net in (model.networks[0], one.networks[0]))
    assert own < with_style
    assert other.networks[1] is not None and one.networks[1] is None, "ink changes the text encoder"


@pytest.mark.parametrize(
    ("loras", "named"),
    [
        ([{"name": "chalk"}], "loras: got 'chalk'; allowed: broken, ink, of-another-base, oil"),
        ([{"name": "../loras/ink"}], "allowed: broken, ink"),
        ([{"name": "ink", "weight": 9}], "weight: got 9; allowed: less than or equal to 2"),
        ([{"name": "ink", "weight": -2.5}], "greater than or equal to -2"),
        ([{"name": "ink"}, {"name": "ink"}], "each name once"),
        ([{"name": "ink", "file": "x"}], "file"),
        ([{"name": "of-another-base"}], "of-another-base.*an adapter of layers of this UNet2DConditionModel"),
        ([{"name": "broken"}], "broken.*a LoRA of StableDiffusionPipeline"),
        ([{"name": "ink"}] * 5, "loras"),
    ],
)
def test_a_style_that_is_not_there_or_does_not_fit_is_refused(
    styled: tuple[TestClient, Path], loras: Any, named: str
) -> None:
    client, folder = styled
    message = error_of(asked(client, "one", 1, loras=loras), 400)["message"]
    assert re.search(named, message) and str(folder) not in message


# --- the safety checker of a pipeline


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion with a checker that flags some pictures, adopted, and an adapter on it."""
    root = tmp_path_factory.mktemp("checked")
    pipe = build("sd", root / "base")
    torch.manual_seed(1)
    sides = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sides, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=sides, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for embeds in (checker.concept_embeds, checker.special_care_embeds):
            embeds.normal_()
        checker.visual_projection.weight.normal_()
        checker.vision_model.embeddings.patch_embedding.weight.mul_(50)
        checker.special_care_embeds_weights.fill_(2)
        checker.concept_embeds_weights.fill_(2)
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(root / "base")
    scores = []
    generator = Generator.from_pretrained(root / "base")
    pixels = ((generator.sample(range(12), prompts=["a barn"] * 12, steps=2) + 1) * 127.5).round().byte()
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        seen = extractor(Image.fromarray(picture), return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(seen)[1])
        scores.append(float(torch.cosine_similarity(embeds, checker.concept_embeds).max()))
    checker.concept_embeds_weights.data.fill_(float(np.median(scores)))
    pipe.save_pretrained(root / "base")
    adopt(root / "base", root / "served", [2], "ddim", 1.0)
    return root


def test_a_pipelines_safety_checker_is_asked_and_flagged_pictures_are_not_shown(checked: Path) -> None:
    assert (checked / "served" / "safety_checker" / "model.safetensors").is_file()
    assert Bases().open(checked / "served", "cpu").twin().safety == checked / "served", "an adapter has its base's"
    pipe = KIND.from_pretrained(checked / "served")
    pipe.set_progress_bar_config(disable=True)
    shutil.copytree(checked / "served", checked / "weights" / "served")
    settings = Settings(weights=checked / "weights", device="cpu", tune_seconds=0)
    with TestClient(create_app(settings)) as client:
        until_ready(lambda: client.get("/readyz"))
        flagged = []
        for seed in range(8):
            rng = torch.Generator().manual_seed(seed)
            found = pipe("a barn", num_inference_steps=2, guidance_scale=1.0, generator=rng, height=16, width=16)
            answer = client.post(GENERATE, json={"model": "served", "prompt": "a barn", "seed": seed, "steps": 2})
            flagged.append(found.nsfw_content_detected[0])
            if flagged[-1]:
                error = error_of(answer, 400)
                assert error["code"] == "content_policy_violation" and "safety checker of served" in error["message"]
            else:
                assert np.abs(pictures(answer)[0] - np.asarray(found.images[0]).astype(int)).max() <= 1
        assert {True, False} == set(flagged)


def test_a_checker_that_is_named_and_missing_is_refused(checked: Path, tmp_path: Path) -> None:
    shutil.copytree(checked / "base", tmp_path / "x")
    (tmp_path / "x" / "safety_checker" / "config.json").unlink()
    with pytest.raises(BadInput, match=r"safety_checker/config\.json: got 'missing'"):
        Generator.from_pretrained(tmp_path / "x")


# --- memory


def test_an_autoencoder_decodes_in_slices_and_tiles_what_it_decodes_at_once(weights: Path) -> None:
    sizes = list[list[tuple[int, ...]]]()
    drawn = {}
    for way in ("whole", "slices", "tiles"):
        model = Model.open("one", weights / "one", "cpu", 4, decoding=way)
        vae, seen = model.generator.codec.vae, list[tuple[int, ...]]()
        vae.decoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(tuple(inputs[0].shape)))
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            drawn[way] = model.generator.codec.decode(latents)
        sizes.append(seen)
    assert sizes[0] == [(2, 4, 16, 16)] and sizes[1] == [(1, 4, 16, 16)] * 2
    assert len(sizes[2]) > 2 and {size[2:] <= (8, 8) for size in sizes[2]} == {True}
    torch.testing.assert_close(drawn["slices"], drawn["whole"], atol=1e-5, rtol=1e-5)
    assert drawn["tiles"].shape == (2, 3, 32, 32)
    assert Settings(decoding="tiles").decoding == "tiles"
