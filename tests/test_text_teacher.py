"""Text-to-image teachers: a text encoder, a vocabulary and a U-Net trained from captions, and students of them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.model import Model
from distillers.data.captioned import CaptionedFolder
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput
from distillers.evaluation.adherence import ShapesJudge
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.merge import merge
from distillers.jobs.recipe import Recipe
from distillers.methods import multi_student
from distillers.methods.diffusion import without_condition
from distillers.methods.multi_student import MultiStudent, equal_clusters
from distillers.models.clusters import clusters_of
from distillers.models.codec import Vae, fold_shift
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import from_config
from distillers.teacher import Teacher
from distillers.training.latents import encoded_once
from distillers.training.text_encoder import TextSettings, untrained_encoder
from distillers.training.trainer import begin
from distillers.weights.manifest import Info
from distillers.weights.write import write_autoencoder

SIDE = 16
NETWORK: dict[str, Any] = {
    "block_out_channels": [16, 24], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TRAIN = {"iterations": 4, "batch": 4, "warmup": 1, "learning_rate": 1e-3, "samples": 2, "checkpoint_every": 2}
PROMPTS = ["a large red circle", "a small blue square"]


def autoencoder() -> Vae:
    """An untrained one of factor 2, with statistics as our own have them."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.4, shift_factor=-0.7,
    )  # fmt: skip
    return Vae(vae)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/{train,test} with captions, and an autoencoder."""
    root = tmp_path_factory.mktemp("text")
    for split, count in {"train": 12, "test": 6}.items():
        data = CaptionedShapes(SIDE, split=split)
        (root / "data" / split).mkdir(parents=True)
        images = ((data.items(range(count))["image"] + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        lines = []
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / "data" / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": data.caption(i)}))
        (root / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    info = Info(
        name="vae", task="autoencoder", method="autoencoder", role="teacher", data="d", sampler="ddim",
        size=(SIDE, SIDE), codec="vae", patch=2,
    )  # fmt: skip
    write_autoencoder(root / "vae", autoencoder(), info)
    return root


def recipe(folders: Path, **changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "tiny", "method": "diffusion",
        "data": {"kind": "captions", "path": str(folders / "data"), "split": "train", "size": SIDE, "flip": False},
        "model": {
            "task": "text-to-image", "autoencoder": str(folders / "vae"), "prediction": "v", "network": NETWORK,
            "text": {"width": 16, "layers": 1, "heads": 2, "length": 24},
        },
        "diffusion": {"guidance_scale": 3.0, "sampling_steps": 4}, "train": TRAIN,
    }  # fmt: skip
    return Recipe.from_table({**table, **changes})


@pytest.fixture(scope="module")
def teacher(folders: Path) -> Path:
    distill(recipe(folders), folders / "teacher", "cpu")
    return folders / "teacher"


def test_a_teacher_of_captions_is_a_stable_diffusion_pipeline(teacher: Path) -> None:
    generator = Generator.from_pretrained(teacher)
    assert generator.info.task == "text-to-image" and generator.info.guidance_scale == 3.0
    pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    pipe.set_progress_bar_config(disable=True)
    noises = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, height=SIDE, width=SIDE, generator=noises, output_type="np"
    ).images
    ours = generator.sample([3, 4], prompts=PROMPTS, steps=4)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5 - theirs).max() < 1e-4
    assert float((ours - generator.sample([3, 4], prompts=PROMPTS[::-1], steps=4)).abs().max()) > 1e-4


def test_the_text_encoder_learns_with_the_network(folders: Path, tmp_path: Path) -> None:
    own = recipe(folders)
    data = load_data(own)
    base = load_teacher(own, data)
    run = begin(own.distiller(), base, own.settings(), tmp_path, device="cpu")
    before = {name: value.clone() for name, value in run.nets["student"].state_dict().items()}
    for i in range(2):  # the first moves only what the zero-initialised output lets through
        run.iteration(i, data)
    moved = {name for name, value in run.nets["student"].state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("text.") and "token_embedding" in name for name in moved)
    assert any(name.startswith("network.") for name in moved)
    assert run.averages["student"].text is not None
    run.close()


def pooled(own: Recipe, **model: Any) -> Recipe:
    """The same with the caption as a whole in every layer."""
    table = own.table()
    more = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    return Recipe.from_table({**table, "model": {**table["model"], "network": {**NETWORK, **more}, **model}})


def test_a_teacher_begins_with_what_another_has_learnt(folders: Path, teacher: Path, tmp_path: Path) -> None:
    """A layer more changes nothing at first, and learns; stock diffusers draws what it then draws."""
    own, old = pooled(recipe(folders), start=str(teacher)), Generator.from_pretrained(teacher)
    made = load_teacher(own, load_data(own))
    cond = old.encode_condition(2, prompts=PROMPTS)
    assert cond is not None
    x, t = torch.randn(2, 4, SIDE // 2, SIDE // 2), torch.tensor(700.0)
    given = {"text": cond["text"]}
    assert torch.equal(made.denoiser.output(x, t, given), old.denoiser.output(x, t, given))
    assert made.denoiser.text is not None and old.prompts is not None
    learnt = old.prompts.encoders["text_encoder"].state_dict()
    assert all(torch.equal(value, learnt[name]) for name, value in made.denoiser.text.state_dict().items())
    distill(own, tmp_path / "longer", "cpu")
    longer = Generator.from_pretrained(tmp_path / "longer")
    assert longer.denoiser.network.add_embedding.norm2.weight.abs().max() > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "longer")
    pipe.set_progress_bar_config(disable=True)
    noises = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": SIDE, "width": SIDE, "output_type": "np"}
    theirs = pipe(PROMPTS, generator=noises, **told).images
    ours = longer.sample([3, 4], prompts=PROMPTS, steps=4)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5 - theirs).max() < 1e-4


def test_what_no_teacher_can_begin_with_is_named(folders: Path, teacher: Path, tmp_path: Path) -> None:
    own = recipe(folders)
    for wrong, why in (
        ({"prediction": "eps"}, "one network that predicts eps"),
        ({"network": {**NETWORK, "layers_per_block": 2, "block_out_channels": [8, 8]}}, "whose network has"),
        ({"text": {"width": 16, "layers": 1, "heads": 2, "length": 24, "vocabulary": 516}}, "vocabulary"),
    ):
        table = own.table()
        changed = Recipe.from_table({**table, "model": {**table["model"], **wrong, "start": str(teacher)}})
        with pytest.raises(BadInput, match=why) as refused:
            load_teacher(changed, load_data(changed))
        assert refused.value.field == "model.start"


def test_the_same_captions_have_the_same_tokens(folders: Path) -> None:
    """Also where pairs of letters are equally frequent, of which a trainer of vocabularies takes any first."""
    captions = load_data(recipe(folders)).texts  # type: ignore[attr-defined]
    settings = TextSettings(width=16, layers=1, heads=2, length=24)
    found = [untrained_encoder(captions, settings).tokenizers["tokenizer"].get_vocab() for _ in range(30)]
    assert all(one == found[0] for one in found) and len(found[0]) <= settings.vocabulary


def test_a_stopped_training_repeats_what_an_uninterrupted_one_does(
    folders: Path, teacher: Path, tmp_path: Path
) -> None:
    own = recipe(folders)
    data = load_data(own)
    base = load_teacher(own, data)
    data = encoded_once(data, base)
    run = begin(own.distiller(), base, own.settings(), tmp_path, device="cpu")
    for i in range(2):
        run.iteration(i, data)
    run.save(2)
    run.close()
    run = begin(own.distiller(), load_teacher(own, data), own.settings(), tmp_path, device="cpu")
    assert run.resume() == 2
    for i in range(2, 4):
        run.iteration(i, data)
    ours, whole = run.generator().half().float(), Generator.from_pretrained(teacher)
    run.close()
    assert ours.prompts is not None and whole.prompts is not None
    for a, b in ((ours.denoiser, whole.denoiser), (ours.prompts, whole.prompts)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", ["consistency", "dmd2", "hyper_sd", "boot"])
def test_a_student_is_a_stable_diffusion_pipeline_of_one_step(
    folders: Path, teacher: Path, tmp_path: Path, method: str
) -> None:
    options = {"guidance_scale": 2.0}
    data = {"kind": "captions", "path": str(folders / "data"), "split": "train", "size": SIDE, "flip": False}
    table = {"name": "tiny", "method": method, "teacher": str(teacher), "data": data, method: options, "train": TRAIN}
    distill(Recipe.from_table(table), tmp_path / "student", "cpu")
    generator = Generator.from_pretrained(tmp_path / "student")
    assert generator.info.guidance_scale == 1.0, "guidance is in its weights"
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS[:1], num_inference_steps=1, guidance_scale=1.0, height=SIDE, width=SIDE,
        generator=[torch.Generator().manual_seed(3)], output_type="np",
    ).images  # fmt: skip
    ours = generator.sample([3], prompts=PROMPTS[:1], steps=1)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5 - theirs).max() < 2e-3


@pytest.mark.parametrize(
    "method", ["consistency", "dmd2", "hyper_sd", "disback", "scm", "pso", "adversarial_consistency"]
)
def test_a_student_of_adapters_is_put_on_its_teacher_by_stock_diffusers(
    folders: Path, teacher: Path, tmp_path: Path, method: str
) -> None:
    """By the very lines of its card."""
    (tmp_path / "tiny").symlink_to(teacher)  # by its name
    data = {"kind": "captions", "path": str(folders / "data"), "split": "train", "size": SIDE, "flip": False}
    train = {**TRAIN, "learning_rate": 5e-2, "ema": 0.1, "iterations": 6, "checkpointing": True}
    options = {"mode": "finetune", "steps": 1} if method == "pso" else {}
    table = {
        "name": "student", "method": method, "teacher": str(tmp_path / "tiny"), "data": data, "train": train,
        "lora": {"rank": 4, "alpha": 8.0}, method: options,
    }  # fmt: skip
    distill(Recipe.from_table(table), tmp_path / "student", "cpu")
    assert not any((tmp_path / "student" / part).exists() for part in ("unet", "vae", "text_encoder", "tokenizer"))
    lines = (tmp_path / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = lines.replace('"a prompt"', f'["{PROMPTS[0]}"]').replace("steps = {", "steps = {**more, ")
    lines = lines.replace('.images[0].save("sample.png")', ".images").replace("pipe([", "found = pipe([")
    more = {"generator": [torch.Generator().manual_seed(3)], "output_type": "np", "height": SIDE, "width": SIDE}
    said: dict[str, Any] = {"more": more}
    with contextlib.chdir(tmp_path):
        exec(lines, said)
    generator = Generator.from_pretrained(tmp_path / "student")
    ours = generator.sample([3], prompts=PROMPTS[:1])
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5 - said["found"]).max() < 2e-3
    base = replace(generator.info, lora=None)
    bare = Generator(Generator.from_pretrained(teacher).denoiser, generator.codec, base, generator.prompts)
    bare.schedule = generator.schedule
    assert (bare.sample([3], prompts=PROMPTS[:1]) - ours).abs().max() > 2e-3, "the adapter changes the picture"


def test_an_adapter_starts_as_another_one_of_its_teacher(folders: Path, teacher: Path, tmp_path: Path) -> None:
    """With another scale of its own, and only where layers, rank and base are the same."""
    (tmp_path / "tiny").symlink_to(teacher)
    data = {"kind": "captions", "path": str(folders / "data"), "split": "train", "size": SIDE, "flip": False}

    def student(name: str, method: str, options: dict[str, Any], rank: int = 4, **train: Any) -> Generator:
        table = {
            "name": name, "method": method, "teacher": str(tmp_path / "tiny"), "data": data,
            "train": {**TRAIN, "ema": 0.1, **train}, "lora": {"rank": rank, "alpha": 2.0 * rank}, method: options,
        }  # fmt: skip
        distill(Recipe.from_table(table), tmp_path / name, "cpu")
        return Generator.from_pretrained(tmp_path / name)

    first = student("first", "consistency", {}, learning_rate=5e-2)
    again = {"start": str(tmp_path / "first"), "critic_turns": 1}
    second = student("second", "dmd2", again, learning_rate=1e-9, iterations=1)
    bare = Generator.from_pretrained(teacher)
    pictures = [one.sample([3], steps=1, prompts=PROMPTS[:1], guidance_scale=1.0) for one in (first, second, bare)]
    torch.testing.assert_close(pictures[0], pictures[1], atol=2e-3, rtol=0)
    assert (pictures[0] - pictures[2]).abs().max() > 2e-2
    with pytest.raises(BadInput, match=r"lora\.rank: got 2; allowed: 4, the rank of .*first"):
        student("third", "dmd2", again, rank=2)
    with pytest.raises(BadInput, match=r"dmd2\.start: .* adapter of the teacher"):
        student("fourth", "dmd2", {"start": str(teacher)})


def test_students_of_clusters_of_captions_are_one_folder_that_routes_prompts(
    folders: Path, teacher: Path, tmp_path: Path
) -> None:
    data = {"kind": "captions", "path": str(folders / "data"), "split": "train", "size": SIDE, "flip": False}
    options = {"students": 2, "partition": "clusters", "options": {"critic_turns": 1}}
    table = {
        "name": "pair", "method": "multi_student", "teacher": str(teacher), "data": data, "train": TRAIN,
        "multi_student": options,
    }  # fmt: skip
    own = Recipe.from_table(table)
    distill(own, tmp_path / "pair", "cpu")
    texts = load_data(own).texts  # type: ignore[attr-defined]
    both = Generator.from_pretrained(tmp_path / "pair")
    alone = [Generator.from_pretrained(tmp_path / "pair" / "training" / f"student-{k}") for k in (0, 1)]
    clusters = both.info.clusters
    assert clusters is not None and clusters.students == [0, 1] and both.info.students == 2
    assert [one.info.part for one in alone] == [[0], [1]]
    cond = both.encode_condition(len(texts), prompts=texts)
    assert cond is not None
    of = clusters.of(cond)
    assert torch.bincount(of).tolist() == [6, 6], "as many captions each"
    assert [of[texts.index(one)] for one in clusters.examples] == [0, 1]
    drawn = both.sample(range(4), prompts=texts[:4])
    for i in range(4):
        mine, other = (alone[k].sample([i], prompts=[texts[i]]) for k in (int(of[i]), 1 - int(of[i])))
        torch.testing.assert_close(drawn[i : i + 1], mine, atol=1e-4, rtol=0)
        assert not torch.equal(mine, other)
    served = Model.open("pair", tmp_path / "pair", "cpu", 8)
    assert served.students == served.describe()["students"] == 2
    assert all(served.inputs(1, k) for k in (0, 1)), "each student is called with its own example"
    learnt = [own.distiller(), *(replace(own.distiller(), student=k) for k in (0, 1))]  # type: ignore[type-var]
    opened = Teacher.from_pretrained(teacher)
    parts = [one.data(load_data(own), opened) for one in learnt[1:]]
    assert [len(part) for part in parts] == [6, 6] and len(parts[0].draw(5, np.random.default_rng(0))["image"]) == 5
    with pytest.raises(BadInput, match=r"multi_student\.student"):
        learnt[0].data(load_data(own), opened)
    card = (tmp_path / "pair" / "README.md").read_text()
    assert f"`students/1` draws those like {clusters.examples[1]!r}" in card
    exec(card.split("```python\n")[1].split("```")[0].replace('"pair"', repr(str(tmp_path / "pair"))), {})
    for change, field in (({"partition": "consecutive"}, "partition"), ({"students": 13}, "students")):
        with pytest.raises(BadInput, match=f"multi_student.{field}"):
            wrong = Recipe.from_table({**table, "multi_student": {**options, "student": 0, **change}})
            wrong.distiller().data(load_data(own), opened)
    spoilt = tmp_path / "pair" / "training" / "student-1"
    info = Info.read(spoilt)
    assert info.clusters is not None
    replace(info, clusters=replace(info.clusters, prices=[0.0, 1.0])).write(spoilt)
    with pytest.raises(BadInput, match="clusters of prompts"):
        merge([tmp_path / "pair" / "training" / f"student-{k}" for k in (0, 1)], tmp_path / "merged")


def test_clusters_are_found_by_captions_from_all_over_the_data(
    folders: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do not depend on how many captions are encoded at a time."""
    data, opened = load_data(recipe(folders)), Teacher.from_pretrained(teacher)
    method = MultiStudent(students=2, student=1, partition="clusters")
    assert isinstance(data, CaptionedFolder)
    at_once, part = method.clusters(data, opened), method.data(data, opened)
    monkeypatch.setattr(multi_student, "ENCODED", 5)
    in_turn, same = method.clusters(data, opened), method.data(data, opened)
    torch.testing.assert_close(torch.tensor(in_turn.centres), torch.tensor(at_once.centres))
    assert isinstance(part, CaptionedFolder) and isinstance(same, CaptionedFolder) and part.texts == same.texts
    every, encode, seen = sorted(set(data.texts)), multi_student._encoded, list[str]()
    monkeypatch.setattr(multi_student, "FITTED", 4)
    monkeypatch.setattr(multi_student, "_encoded", lambda texts, of: (seen.extend(texts), encode(texts, of))[1])
    method.clusters(data, opened)
    assert seen == every[:: len(every) // 4], "as many as are fitted, not the first of them"
    with pytest.raises(BadInput, match=r"multi_student\.students: got 5; allowed: 1 to 4"):
        MultiStudent(students=5, partition="clusters").clusters(data, opened)


@pytest.mark.parametrize(("points", "count"), [(12, 2), (60, 5), (300, 4)])
def test_prices_make_clusters_equal(points: int, count: int) -> None:
    found = torch.randn(points, 6, generator=torch.Generator().manual_seed(points), dtype=torch.float64)
    found[: points // 2] *= 0.1  # half of them lie close together
    own = clusters_of([str(i) for i in range(points)], found, equal_clusters(found, count))
    sizes = torch.bincount(own.of({"text": found[:, None]}), minlength=count)
    assert (sizes - points / count).abs().max() <= max(1, 0.02 * points), sizes
    nearest = torch.cdist(found, torch.tensor(own.centres, dtype=torch.float64)).argmin(1)
    assert (torch.bincount(nearest, minlength=count) - points / count).abs().max() > (
        sizes - points / count
    ).abs().max()


def test_the_recipes_of_captioned_shapes_run_at_tiny_size(tmp_path: Path) -> None:
    tiny = ["train.iterations=2", "train.batch=2", "train.warmup=1", "train.samples=1", "train.precision=no"]
    network = ["autoencoder.channels=[8, 8, 8]", "autoencoder.discriminator_channels=8", "data.size=16"]
    distill(Recipe.load("shapes-autoencoder", [*tiny, *network]), tmp_path / "vae", "cpu")
    widths = ["model.network.block_out_channels=[16, 32]", "model.text.width=16", "model.text.layers=1"]
    own = Recipe.load("shapes-sd-teacher", [*tiny, *widths, "data.size=16", f"model.autoencoder={tmp_path / 'vae'}"])
    distill(own, tmp_path / "teacher", "cpu")
    data = load_data(own, "test")
    assert isinstance(data, CaptionedShapes)
    captions, opened = data.captions(range(200)), Generator.from_pretrained(tmp_path / "teacher")
    assert opened.prompts is not None and not any(map(opened.prompts.unread, captions))
    assert ShapesJudge()(opened.sample([0, 1], prompts=captions[:2], steps=2), captions[:2]).asked.any()


def test_the_shift_of_latents_moves_into_the_convolutions() -> None:
    codec, pixels = autoencoder(), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    torch.manual_seed(2)
    for conv in (codec.vae.quant_conv, codec.vae.post_quant_conv):
        torch.nn.init.normal_(conv.bias)
    folded = fold_shift(codec)
    assert folded.vae.config.shift_factor is None and codec.vae.config.shift_factor == -0.7
    latents = codec.encode(pixels)
    torch.testing.assert_close(folded.encode(pixels), latents)
    torch.testing.assert_close(folded.decode(latents), codec.decode(latents))
    codec.vae.post_quant_conv = None
    with pytest.raises(BadInput, match="shift_factor"):
        fold_shift(codec)


def test_dropped_captions_become_the_empty_one() -> None:
    sizes = torch.tensor([[16.0, 24.0]] * 3)  # which stay, as all does that has no null
    cond = {"tokens": torch.ones(3, 4), "null_tokens": torch.zeros(1, 4).expand(3, 4), "ids": sizes}
    found = without_condition(
        cond, torch.tensor([True, False, True]), Denoiser(torch.nn.Identity(), from_config({"name": "vp"}), "v")
    )
    assert set(found) == {"tokens", "ids"} and torch.equal(found["ids"], sizes)
    assert found["tokens"][:, 0].tolist() == [0, 1, 0]


def test_the_vocabulary_is_that_of_the_captions() -> None:
    encoder = untrained_encoder(["a teal circle", "a small square"] * 3, TextSettings(width=16, heads=2, length=12))
    tokens = encoder.tokens(["a teal circle", "a Teal circle", "a quiz"])
    assert torch.equal(tokens[0], tokens[1]), "case does not matter"
    again = untrained_encoder(["a teal circle", "a small square"] * 3, TextSettings(width=16, heads=2, length=12))
    assert again.tokenizers["tokenizer"].get_vocab() == encoder.tokenizers["tokenizer"].get_vocab(), (
        "a stopped training would go on in another"
    )
    words = encoder.tokenizers["tokenizer"].convert_ids_to_tokens(tokens[0].tolist())
    assert words[:5] == ["<|startoftext|>", "a</w>", "teal</w>", "circle</w>", "<|endoftext|>"]
    words = encoder.tokenizers["tokenizer"].convert_ids_to_tokens(tokens[2].tolist())
    assert "".join(words[2:5]) == "quiz</w>", "what is no word of the captions is spelt by parts of words"


def test_what_is_wrong_is_named(folders: Path) -> None:
    model = {**recipe(folders).model}
    for change, field in (
        ({"autoencoder": None}, "model.autoencoder"),
        ({"task": "image"}, "model.text"),
        ({"text": {"width": 10, "heads": 3}}, "model.text.heads"),
        ({"text": {"depth": 3}}, "model.text.depth"),
    ):
        table = {k: v for k, v in {**model, **change}.items() if v is not None}
        with pytest.raises(BadInput, match=field):
            wrong = recipe(folders, model=table)
            load_teacher(wrong, load_data(wrong))
    plain = {"kind": "images", "path": str(folders / "data"), "split": "train", "size": SIDE}
    with pytest.raises(BadInput, match="captions"):
        load_teacher(recipe(folders, data=plain), load_data(recipe(folders, data=plain)))
