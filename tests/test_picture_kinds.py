"""Teachers of other pictures than RGB squares: stock pipelines are opened, distilled, measured, drawn and served."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from folders import noise, save
from networks import unet
from numpy.typing import NDArray
from PIL import Image
from service import GENERATE, SIDE, file_of, pixels_of, publish, until_ready
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.main import create_app
from app.media.image_files import decode_picture, encode
from app.settings import Settings
from distillers.cli import app as command
from distillers.data.image_folder import ImageFolder
from distillers.errors import BadInput
from distillers.evaluation.features import load_features
from distillers.evaluation.pictures import grid, to_pixels
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.models.bands import as_rgb, visible
from distillers.teacher import Teacher
from distillers.training.reward import greenness
from distillers.weights.manifest import Info
from distillers.weights.read import read_info

EDIT = "/v1/images/edits"


def stock(folder: Path, channels: int, size: int | tuple[int, int] = SIDE, **options: Any) -> Path:
    """Save a pipeline by diffusers' own classes, untrained."""
    network = unet(sample_size=size, in_channels=channels, out_channels=channels, **options)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def recipe(teacher: Path, pictures: Path, **data: Any) -> Recipe:
    train = {"iterations": 1, "batch": 2, "samples": 2, "tracker": "none"}
    table = {"kind": "images", "path": str(pictures), **data}
    about = {"name": "mine", "method": "consistency", "teacher": str(teacher), "student": {"head_iterations": 3}}
    return Recipe.from_table({**about, "data": table, "train": train})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train and a test split of colour pictures with a fourth band, larger than any teacher's."""
    root = tmp_path_factory.mktemp("data") / "mine"
    for i in range(140):
        save(root / "test" / f"{i:03d}.png", noise(i, 20, 24, 4))
    for i in range(4):
        save(root / "train" / f"{i:03d}.png", noise(1000 + i, 20, 24, 4))
    return root


@pytest.fixture(scope="module", params=[1, 4])
def channels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, channels: int) -> Path:
    return stock(tmp_path_factory.mktemp("teacher") / "stock", channels)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Path, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("student") / "mine"
    distill(recipe(teacher, pictures, split="train"), folder, "cpu")
    return folder


def test_one_band_is_seen_as_grey_and_of_more_than_three_the_first_three() -> None:
    images = torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1).expand(2, 4, 5, 6)
    assert [tuple(visible(images[:, :n]).shape) for n in (1, 2, 3, 4)] == [(2, n, 5, 6) for n in (1, 1, 3, 3)]
    assert to_pixels(images)[0, 0, 0].tolist() == [0, 85, 170]
    assert to_pixels(images[:, 1:2])[0, 0, 0].tolist() == [85, 85, 85]
    assert as_rgb(images[:, :2])[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert [grid(images[:, :n], 2).mode for n in (1, 2, 3, 4)] == ["L", "L", "RGB", "RGB"]


def test_files_become_pictures_of_as_many_bands_as_asked(tmp_path: Path) -> None:
    pixels = noise(0, 16, 16, 4)
    save(tmp_path / "a.png", pixels)
    for channels, wanted in ((1, Image.fromarray(pixels).convert("L")), (3, pixels[..., :3]), (4, pixels)):
        data = ImageFolder(tmp_path, size=16, channels=channels)
        (seen,) = ((data.items([0])["image"] + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert data.channels == channels and (seen == np.asarray(wanted).reshape(16, 16, channels)).all()
    halved = ImageFolder(tmp_path, size=8, channels=4).pixels[0]
    for band in range(4):  # none is transparency, which would weight the others
        alone = Image.fromarray(pixels[..., band]).resize((8, 8), Image.Resampling.BICUBIC)
        assert (halved[..., band] == np.asarray(alone)).all()
    with pytest.raises(BadInput, match=r"a\.png: got '4 bands'; allowed: 5 bands"):
        ImageFolder(tmp_path, size=16, channels=5).items([0])
    with pytest.raises(BadInput, match="channels: got 0"):
        ImageFolder(tmp_path, size=16, channels=0)


def test_bands_come_from_tiff_files_too(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    pixels = noise(0, 12, 16, 5)
    options = {"driver": "GTiff", "width": 16, "height": 12, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", count=5, **options) as raster:
        raster.write(pixels.transpose(2, 0, 1))
    (seen,) = ImageFolder(tmp_path, size=(12, 16), channels=5).pixels
    assert (seen == pixels).all()
    with pytest.raises(BadInput, match=r"a\.tif: got '5 bands of uint8, 16x12 px'; allowed: 4 bands of 8 bits"):
        ImageFolder(tmp_path, size=(12, 16), channels=4).items([0])
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:200])
    with pytest.raises(BadInput, match=r"a\.tif"):
        ImageFolder(tmp_path, size=(12, 16), channels=5).items([0])


def test_a_stock_pipeline_tells_what_it_draws_before_its_weights_are_read(teacher: Path, channels: int) -> None:
    info = read_info(teacher)
    assert (info.channels, tuple(info.size), info.task) == (channels, (SIDE, SIDE), "image")
    assert info == Generator.from_pretrained(teacher).info


@pytest.mark.parametrize(
    ("taken", "made", "channels", "task"),
    [(1, 2, 1, "image"), (4, 3, 3, "sar-to-optical"), (4, 6, 3, "sar-to-optical"), (5, 5, 5, "image")],
)
def test_channels_in_and_out_say_what_a_network_draws(
    tmp_path: Path, taken: int, made: int, channels: int, task: str
) -> None:
    network = unet(sample_size=SIDE, in_channels=taken, out_channels=made)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "t")  # type: ignore[arg-type]
    generator = Generator.from_pretrained(tmp_path / "t")
    assert (generator.info.channels, generator.info.task) == (channels, task)
    sar = torch.zeros(1, 1, SIDE, SIDE) if task == "sar-to-optical" else None
    assert generator.sample([0], steps=1, sar=sar).shape == (1, channels, SIDE, SIDE)


def test_a_teacher_draws_what_the_stock_pipeline_draws(teacher: Path, channels: int) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(teacher)
    drawn = Generator.from_pretrained(teacher).sample([0, 1], steps=1)
    start = torch.randn(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eps = pipeline.unet(start, 999).sample
    alpha = float(pipeline.scheduler.alphas_cumprod[-1]) ** 0.5
    x0 = ((start - (1 - alpha**2) ** 0.5 * eps) / alpha).clamp(-1, 1)
    torch.testing.assert_close(drawn[1:], x0, atol=1e-4, rtol=1e-4)


def test_the_student_is_published_with_its_bands_and_opens_in_stock_diffusers(student: Path, channels: int) -> None:
    info = Info.read(student)
    assert (info.channels, tuple(info.size)) == (channels, (SIDE, SIDE))
    ours = to_array(Generator.from_pretrained(student).sample([5], steps=1))
    pipeline: Any = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(num_inference_steps=1, generator=torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def to_array(images: torch.Tensor) -> NDArray[np.float32]:
    return ((images + 1) / 2).permute(0, 2, 3, 1).numpy()


def test_the_command_draws_and_measures(student: Path, teacher: Path, channels: int, tmp_path: Path) -> None:
    drawn = CliRunner().invoke(command, ["generate", str(student), "--steps", "1", "--out", str(tmp_path / "x.png")])
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "x.png").mode == {1: "L", 4: "RGB"}[channels]
    drawn = CliRunner().invoke(command, ["generate", str(student), "--n", "2", "--out", str(tmp_path / "x.npy")])
    assert drawn.exit_code == 0, drawn.output
    whole = np.load(tmp_path / "x.npy")
    assert whole.shape == (2, channels, SIDE, SIDE) and whole.dtype == np.float32 and abs(whole).max() <= 1
    assert Image.open(student / "grid.png").size[0] > 10 * SIDE
    options = ["--n", "140", "--features", "shapes", "--teacher", str(teacher), "--teacher-steps", "2", "--steps", "1"]
    measured = CliRunner().invoke(command, ["evaluate", str(student), *options, "--out", str(tmp_path / "r.json")])
    assert measured.exit_code == 0, measured.output + str(measured.exception)
    assert "student, 1 step" in measured.output and "teacher, 2 steps" in measured.output


def test_adopting_keeps_the_bands(teacher: Path, channels: int, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["adopt", str(teacher), str(tmp_path / "adopted")])
    assert done.exit_code == 0, done.output
    assert Info.read(tmp_path / "adopted").channels == channels


def test_what_is_not_said_about_the_data_is_taken_from_the_teacher(pictures: Path, tmp_path: Path) -> None:
    teacher = stock(tmp_path / "grey", 1)
    plan = recipe(teacher, pictures, split="test")
    data = load_data(plan)
    assert data.items([0])["image"].shape == (1, 1, SIDE, SIDE)
    assert load_teacher(plan, data).encode_batch(data.items([0, 1]), "cpu")["x0"].shape == (2, 1, SIDE, SIDE)
    for name, wrong, told in (("size", 8, f"{SIDE}, {SIDE}"), ("channels", 3, "1, as the teacher")):
        plan = recipe(teacher, pictures, split="test", **{name: wrong})
        with pytest.raises(BadInput, match=rf"data\.{name}: got .*{wrong}.*; allowed: .*{told}"):
            load_teacher(plan, load_data(plan))


def test_folders_of_images_have_no_size_in_silence(pictures: Path) -> None:
    table = {"name": "t", "method": "diffusion", "data": {"kind": "images", "path": str(pictures), "split": "test"}}
    with pytest.raises(BadInput, match=r"data\.size: got None; allowed: a side"):
        load_data(Recipe.from_table(table))
    table["data"] |= {"size": 8}  # type: ignore[operator]
    data = load_data(Recipe.from_table(table | {"model": {"channels": 1}}))
    assert data.items([0])["image"].shape == (1, 1, 8, 8)


def test_grey_teachers_are_trained_by_a_recipe(pictures: Path, tmp_path: Path) -> None:
    network = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 4}
    model = {"channels": 1, "network": {**network, "up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1}}
    data = {"kind": "images", "path": str(pictures), "split": "train", "size": 8}
    train = {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"}
    table = {"name": "t", "method": "diffusion", "data": data, "model": model, "train": train}
    distill(Recipe.from_table(table | {"diffusion": {"sampling_steps": 2}}), tmp_path / "t", "cpu")
    assert Teacher.from_pretrained(tmp_path / "t").example()[0].shape == (1, 1, 8, 8)


def test_autoencoders_and_teachers_in_their_latents_are_grey_too(pictures: Path, tmp_path: Path) -> None:
    train = {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"}
    data = {"kind": "images", "path": str(pictures), "split": "train", "size": 16, "channels": 1}
    options = {"channels": [8, 8], "layers": 1, "latent_channels": 2, "discriminator_channels": 8}
    options |= {"perceptual_weight": 0.0, "adversarial_weight": 0.5, "adversarial_start": 0.0}
    table = {"name": "a", "method": "autoencoder", "data": data, "train": train, "autoencoder": options}
    distill(Recipe.from_table(table), tmp_path / "a", "cpu")
    assert Info.read(tmp_path / "a").channels == 1 and Image.open(tmp_path / "a" / "grid.png").size
    network = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 4}
    network |= {"up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1}  # type: ignore[dict-item]
    model = {"channels": 1, "network": network, "autoencoder": str(tmp_path / "a")}
    table = {"name": "t", "method": "diffusion", "data": data, "train": train, "model": model}
    distill(Recipe.from_table({**table, "diffusion": {"sampling_steps": 2}}), tmp_path / "t", "cpu")
    teacher = Generator.from_pretrained(tmp_path / "t")
    assert teacher.info.channels == 1 and teacher.sample([0], steps=1).shape == (1, 1, 16, 16)
    with pytest.raises(BadInput, match=r"model\.channels: got 3; allowed: 1, as the autoencoder"):
        plan = Recipe.from_table({**table, "data": {**data, "channels": 3}, "model": {**model, "channels": 3}})
        load_teacher(plan, load_data(plan))


def test_features_see_what_people_see() -> None:
    features, images = load_features("shapes"), torch.rand(2, 4, 32, 32) * 2 - 1
    torch.testing.assert_close(features(images), features(images[:, :3]))
    torch.testing.assert_close(features(images[:, :1]), features(images[:, :1].repeat(1, 3, 1, 1)))
    with pytest.raises(BadInput, match="greenness of 1 bands"):
        greenness(images[:, :1], None)


def test_manifests_of_rgb_say_nothing_new_and_translators_draw_rgb(tmp_path: Path) -> None:
    publish(tmp_path, "plain", "image")
    assert '"channels"' not in (tmp_path / "plain" / "fewstep.json").read_text()
    info = Info.read(tmp_path / "plain")
    sar = {"channels": 1}
    for wrong, field in (
        (replace(info, channels=0), "channels"),
        (replace(info, task="sar-to-optical", sar=sar, channels=1), "channels"),
    ):
        wrong.write(tmp_path / "plain")
        with pytest.raises(BadInput, match=field):
            Info.read(tmp_path / "plain")
    replace(info, channels=1).write(tmp_path / "plain")
    with pytest.raises(BadInput, match="3 in, 3 out"):
        Generator.from_pretrained(tmp_path / "plain")


# --- shape
def drawn_by_stock(folder: Path, seed: int, **more: Any) -> NDArray[np.float32]:
    """Draw one picture (H, W, C) in 0..1 in one step by the pipeline that a folder's index names."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(num_inference_steps=1, generator=start, output_type="np", **more).images[0])


@pytest.mark.parametrize("size", [(16, 24), 28, 12], ids=str)
def test_any_shape_that_a_network_draws_is_learnt_published_and_measured(
    size: int | tuple[int, int], pictures: Path, tmp_path: Path
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    teacher = stock(tmp_path / "stock", 3, size)
    plan = recipe(teacher, pictures, split="train")
    assert load_data(plan).items([0, 1])["image"].shape == (2, 3, height, width)
    distill(plan, tmp_path / "mine", "cpu")
    student = Generator.from_pretrained(tmp_path / "mine")
    assert tuple(student.info.size) == (height, width)
    np.testing.assert_allclose(
        drawn_by_stock(tmp_path / "mine", 5), to_array(student.sample([5], steps=1))[0], atol=1e-4
    )
    options = ["--n", "140", "--features", "shapes", "--teacher", str(teacher), "--teacher-steps", "1", "--steps", "1"]
    measured = CliRunner().invoke(command, ["evaluate", str(tmp_path / "mine"), *options])
    assert measured.exit_code == 0, measured.output + str(measured.exception)


def test_what_no_stock_pipeline_draws_has_no_index(tmp_path: Path) -> None:
    teacher = stock(tmp_path / "t", 3, (16, 24), num_class_embeds=2)  # diffusers hands labels to squares alone
    done = CliRunner().invoke(command, ["adopt", str(teacher), str(tmp_path / "a")])
    assert done.exit_code == 0 and "24x16" in done.output
    assert not (tmp_path / "a" / "model_index.json").exists()
    assert Generator.from_pretrained(tmp_path / "a").sample([0], labels=[1], steps=1).shape == (1, 3, 16, 24)


def test_pictures_are_cropped_around_their_centre_to_the_shape(tmp_path: Path) -> None:
    pixels = noise(0, 30, 40)
    save(tmp_path / "a.png", pixels)
    (wide,) = ImageFolder(tmp_path, size=(10, 40)).pixels
    assert (wide == pixels[10:20]).all()
    (high,) = ImageFolder(tmp_path, size=(30, 10)).pixels
    assert (high == pixels[:, 15:25]).all()
    (halved,) = ImageFolder(tmp_path, size=[10, 20]).pixels
    expected = Image.fromarray(pixels[5:25]).resize((20, 10), Image.Resampling.BICUBIC)
    assert abs(halved.astype(int) - np.asarray(expected)).max() <= 1
    for wrong in ([10], [10, 10, 10], [10, 4], "10", [10, 20.0]):
        with pytest.raises(BadInput, match="size"):
            ImageFolder(tmp_path, size=wrong)  # type: ignore[arg-type]


def test_pictures_that_are_not_square_are_turned_upside_down_only(tmp_path: Path) -> None:
    pixels = noise(0, 8, 12)
    save(tmp_path / "a.png", pixels)
    data = ImageFolder(tmp_path, size=(8, 12), dihedral=True)
    seen = ((data.draw(64, np.random.default_rng(0))["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    ways = [pixels, pixels[::-1, ::-1], pixels[:, ::-1], pixels[::-1]]
    found = [[i for i, way in enumerate(ways) if (picture == way).all()] for picture in seen]
    assert sorted({one for (one,) in found}) == [0, 1, 2, 3]


def test_a_shape_that_the_teacher_does_not_draw_is_refused(pictures: Path, tmp_path: Path) -> None:
    plan = recipe(stock(tmp_path / "t", 3, (16, 24)), pictures, split="train", size=[24, 16])
    with pytest.raises(BadInput, match=r"data\.size: got .*24, 16.*allowed: absent, .*16, 24"):
        load_teacher(plan, load_data(plan))


# --- served
def test_pictures_are_encoded_as_they_are_seen_and_raw_with_all_bands() -> None:
    pixels = noise(0, 9, 12, 5)
    for channels, wanted in ((1, pixels[..., 0]), (2, pixels[..., 0]), (3, pixels[..., :3]), (5, pixels[..., :3])):
        some = pixels[..., :channels]
        assert (np.asarray(Image.open(io.BytesIO(encode(some, "png")))) == wanted).all()
        assert encode(some, "raw") == some.tobytes()
        for output_format in ("jpeg", "webp"):
            assert Image.open(io.BytesIO(encode(some, output_format))).size == (12, 9)


def test_an_uploaded_picture_becomes_grey_where_the_model_is() -> None:
    pixels = noise(0, 9, 12, 3)
    grey = decode_picture(file_of(pixels), 10_000, 1)
    assert grey.shape == (1, 9, 12)
    assert (np.round((grey[0] + 1) * 127.5) == np.asarray(Image.fromarray(pixels).convert("L"))).all()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("served")
    publish(root, "grey", "image", channels=1)
    publish(root, "bands", "image", channels=4)
    wide = Generator.from_pretrained(stock(root / ".stock", 1, (16, 24)))
    wide.info = replace(wide.info, name="wide")
    wide.save_pretrained(root / "wide")
    with TestClient(create_app(Settings(weights=root, device="cpu", tune_seconds=0))) as opened:
        until_ready(lambda: opened.get("/readyz"))
        yield opened


def test_a_grey_model_answers_with_grey_files(client: TestClient) -> None:
    body = {"model": "grey", "seed": 3, "steps": 2}
    answer = client.post(GENERATE, json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.mode, picture.size) == ("L", (SIDE, SIDE))
    raw = client.post(GENERATE, json=body, headers={"Accept": "application/octet-stream"})
    assert raw.content == np.asarray(picture).tobytes()
    drawn = Generator.from_pretrained(client.app.state.engine.models["grey"].folder).sample([3], steps=2)  # type: ignore[attr-defined]
    assert abs(to_pixels(drawn)[0, ..., 0].astype(int) - np.asarray(picture)).max() <= 1
    assert client.get("/v1/models/grey").json()["channels"] == 1


def test_a_model_of_four_bands_is_shown_by_three_and_sent_whole_as_raw_bytes(client: TestClient) -> None:
    body = {"model": "bands", "seed": 3, "steps": 2}
    shown = pixels_of(client.post(GENERATE, json=body, headers={"Accept": "image/png"}).content)
    raw = client.post(GENERATE, json=body, headers={"Accept": "application/octet-stream"})
    whole = np.frombuffer(raw.content, np.uint8).reshape(SIDE, SIDE, 4)
    assert (whole[..., :3] == shown).all()
    assert client.get("/v1/models/bands").json()["channels"] == 4


def test_pictures_that_are_no_squares_are_served_and_edited(client: TestClient) -> None:
    answer = client.post(GENERATE, json={"model": "wide", "size": "24x16", "steps": 1}, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.mode, picture.size) == ("L", (24, 16))
    upload = {"image": ("a.png", answer.content, "image/png")}
    edited = client.post(EDIT, data={"model": "wide", "steps": "2"}, files=upload, headers={"Accept": "image/png"})
    assert edited.status_code == 200 and Image.open(io.BytesIO(edited.content)).size == (24, 16)
    assert client.post(GENERATE, json={"model": "wide", "size": "16x24"}).status_code == 400


def test_grey_pictures_are_edited_in_grey(client: TestClient) -> None:
    data = {"model": "grey", "seed": "1", "steps": "8", "strength": "0.01"}
    upload = {"image": ("a.png", file_of(noise(1, SIDE, SIDE, 3)), "image/png")}
    answer = client.post(EDIT, data=data, files=upload, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).mode == "L"
    refused = client.post(EDIT, data={**data, "model": "bands"}, files=upload)
    assert refused.status_code == 400 and "these have 4 bands" in refused.json()["error"]["message"]
