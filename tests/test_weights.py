"""The weights folder: what is written opens in stock diffusers, what is damaged or mixed is refused by name."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from draw_with_diffusers import COUNT, ramp
from huggingface_hub.utils import filter_repo_objects
from networks import LABELS, contents, describe, draw_with_diffusers, transformer, untrained, warnings_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.card import write_card
from distillers.models.codec import PixelUnshuffle
from distillers.models.denoiser import Denoiser
from distillers.models.lora import LoraSettings, add_lora
from distillers.models.schedule import EDM, NoiseSchedule, Prediction, RectifiedFlow, VariancePreserving, from_config
from distillers.weights.manifest import Info, find
from distillers.weights.read import FILES, FP16_FILES
from distillers.weights.write import _remove, lcm_times, staged, write_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def with_adapter(generator: Generator) -> Generator:
    """A LoRA student: the network and, on top, a change that is not zero."""
    add_lora(generator.denoiser.network, LoraSettings(rank=2))
    for name, parameter in generator.denoiser.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.03)
    return generator


FOLDERS: dict[str, Callable[[], Generator]] = {
    "plain-teacher": lambda: untrained(describe()),
    "sample-teacher": lambda: untrained(describe(), "x0", {"beta_schedule": "squaredcos_cap_v2"}),
    "noise-teacher": lambda: untrained(describe(), "eps", {"beta_schedule": "scaled_linear"}),
    "class-teacher": lambda: untrained(describe("class-to-image")),
    "patched-teacher": lambda: untrained(describe("class-to-image", patch=2)),
    "sar-teacher": lambda: untrained(describe("sar-to-optical", patch=2)),
    "plain-student": lambda: untrained(describe(sampler="consistency")),
    "class-student": lambda: untrained(describe("class-to-image", "consistency")),
    "sar-student": lambda: untrained(describe("sar-to-optical", "consistency")),
    "patched-student": lambda: untrained(describe("class-to-image", "consistency", patch=2)),
    "transformer-teacher": lambda: transformer(describe("class-to-image")),
    "adapter-student": lambda: with_adapter(untrained(describe("class-to-image", "consistency"))),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    for name, make in FOLDERS.items():
        generator = make()
        generator.info = replace(generator.info, name=name)
        generator.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def stock(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What stock diffusers drew from every folder in a process that cannot import us, and what it said meanwhile."""
    out = tmp_path_factory.mktemp("drawn")
    done = draw_with_diffusers(out, *(saved / name for name in FOLDERS))
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    untrained(describe()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def refused(folder: Path) -> Callable[[str], None]:
    """Opening the folder is refused, naming the part."""

    def check(named: str) -> None:
        with pytest.raises(BadInput) as caught:
            Generator.from_pretrained(folder)
        assert named in str(caught.value) and "\n" not in str(caught.value)

    return check


# --- opened by stock diffusers


@pytest.mark.process
@pytest.mark.parametrize("name", FOLDERS)
def test_stock_diffusers_draws_our_pictures(name: str, saved: Path, stock: tuple[Path, str]) -> None:
    generator = Generator.from_pretrained(saved / name)
    info = generator.info
    labels = list(range(COUNT)) if info.labels else None
    sar = ramp(1, *info.size) if info.task == "sar-to-optical" else None
    drawn = np.load(stock[0] / f"{name}.npz")
    assert len(drawn.files) == len(info.step_times or (1, 5))
    for key in drawn.files:
        ours = generator.sample(range(COUNT), labels=labels, sar=sar, steps=int(key.removeprefix("steps_")))
        theirs = torch.from_numpy(drawn[key]).permute(0, 3, 1, 2)
        assert ours.std() > 0.1  # not a blank that everybody draws alike
        torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3 if info.role == "student" else 1e-4, rtol=0)


@pytest.mark.process
def test_stock_diffusers_has_nothing_to_warn_about(stock: tuple[Path, str]) -> None:
    assert warnings_of(stock[1]) == ""


@pytest.mark.parametrize("name", ["class-student", "noise-teacher", "transformer-teacher"])
def test_saving_and_opening_say_nothing(
    name: str, tmp_path: Path, saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Generator.from_pretrained(saved / name).save_pretrained(tmp_path / "x")
    Generator.from_pretrained(tmp_path / "x", dtype=torch.bfloat16)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_lines_on_the_card_run(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved / name, tmp_path / name)
    write_card(tmp_path / name)
    block = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "examples").mkdir()  # as `publish` makes them for translators
    Image.fromarray(np.full((16, 16), 80, np.uint8)).save(tmp_path / name / "examples" / "0.png")
    known: dict[str, Any] = {}
    exec(block, known)
    drawn = known["pixels"] if "pixels" in known else np.asarray(Image.open("sample.png"))
    assert drawn.shape in ((1, 3, 16, 16), (16, 16, 3)) and drawn.std() > 0


def test_the_network_before_saving_and_after_differ_by_half_precision_only(folder: Path) -> None:
    before = dict(untrained(describe()).denoiser.network.named_parameters())
    stored = load_file(folder / WEIGHTS)
    after = dict(Generator.from_pretrained(folder).denoiser.network.named_parameters())
    assert stored.keys() == before.keys() == after.keys()
    for key, value in stored.items():
        assert value.dtype == torch.float16 and after[key].dtype == torch.float32
        assert torch.equal(value, before[key].half()) and torch.equal(value.float(), after[key])


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    generator = transformer(describe("class-to-image"))
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    generator.save_pretrained(tmp_path / "x")
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    assert {value.dtype for value in generator.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["sample-teacher", "noise-teacher", "class-student", "sar-student"])
def test_a_folder_saved_again_is_the_same_folder(name: str, saved: Path, tmp_path: Path) -> None:
    Generator.from_pretrained(saved / name).save_pretrained(tmp_path / name)
    assert Info.read(tmp_path / name) == Info.read(saved / name)  # and with it every digest
    assert contents(tmp_path / name) == contents(saved / name)


def test_no_path_of_this_machine_is_published(saved: Path, tmp_path: Path) -> None:
    """diffusers keeps in a network's config where it was opened; a student's is its teacher's folder."""
    Generator.from_pretrained(saved / "transformer-teacher").save_pretrained(tmp_path / "x")
    for path in (tmp_path / "x").rglob("*.json"):
        assert str(saved) not in path.read_text() and "_name_or_path" not in path.read_text()


def test_a_clock_of_its_own_is_kept(tmp_path: Path) -> None:
    """Betas that are no diffusers formula, and not 1000 of them."""
    schedule = {"trained_betas": torch.linspace(0.02, 0.3, 30, dtype=torch.float64).tolist()}
    for sampler, kind in (("ddim", DDIMScheduler), ("consistency", LCMScheduler)):
        times = {2: lcm_times(from_config(schedule), 2)} if sampler == "consistency" else {}  # type: ignore[arg-type]
        info = describe(sampler=sampler, step_times=times, default_steps=2)
        generator = untrained(info, schedule=schedule)
        generator.save_pretrained(tmp_path / sampler)
        again, scheduler = (
            Generator.from_pretrained(tmp_path / sampler),
            kind.from_pretrained(tmp_path / sampler / "scheduler"),
        )
        scheduler.set_timesteps(2)
        assert again.times(2) == generator.times(2) == [float(t) for t in scheduler.timesteps]
        every = torch.arange(30)
        torch.testing.assert_close(again.schedule.alpha(every), generator.schedule.alpha(every), atol=1e-6, rtol=1e-5)


def test_a_flow_network_keeps_its_schedule(tmp_path: Path) -> None:
    generator = untrained(describe(), "flow", {"name": "flow"})
    generator.save_pretrained(tmp_path / "flow")
    again = Generator.from_pretrained(tmp_path / "flow")
    assert isinstance(again.schedule, RectifiedFlow) and again.denoiser.prediction == "flow"
    torch.testing.assert_close(again.sample([3], steps=4), generator.sample([3], steps=4), atol=5e-3, rtol=0)
    assert not (tmp_path / "flow" / "model_index.json").exists()  # no stock pipeline draws it


@pytest.mark.parametrize(("schedule", "prediction"), [(EDM(), "x0"), (VariancePreserving.from_betas(), "flow")])
def test_what_no_stock_scheduler_samples_is_refused_before_anything_is_written(
    schedule: NoiseSchedule, prediction: Prediction, tmp_path: Path
) -> None:
    denoiser = Denoiser(untrained(describe()).denoiser.network, schedule, prediction)
    with pytest.raises(BadInput, match=r"schedule.*diffusers"):
        write_pipeline(tmp_path / "x", denoiser, PixelUnshuffle(), describe())
    assert not list(tmp_path.iterdir())


def test_lcm_times_are_the_stock_schedulers() -> None:
    schedule = VariancePreserving.from_betas()
    assert lcm_times(schedule, 1) == [999.0] and lcm_times(schedule, 4) == [999.0, 759.0, 499.0, 259.0]
    for steps in (0, 51):
        with pytest.raises(BadInput, match="steps"):
            lcm_times(schedule, steps)


# --- the manifest


def test_the_manifest_round_trips(tmp_path: Path) -> None:
    info = describe("sar-to-optical", "consistency", sha256={"unet/x": "0"}, teacher="t", guidance_scale=1.5)
    info.write(tmp_path)
    assert Info.read(tmp_path) == info


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("surprise", 1, "surprise"),
        ("task", "text-to-video", "class-to-image"),
        ("sampler", "euler", "consistency"),
        ("role", "pupil", "student"),
        ("format", 2, "format"),
        ("size", 16, "size"),
        ("size", [16, "wide"], "size"),
        ("size", [16, 0], "size"),
        ("patch", 0, "patch"),
        ("step_times", {"one": [999.0]}, "step_times"),
        ("step_times", {"2": [999.0]}, "step_times"),
        ("step_times", [1, 2], "step_times"),
        ("default_steps", "many", "default_steps"),
        ("labels", "Forest", "labels"),
        ("sha256", ["0"], "sha256"),
        ("name", None, "name"),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused_by_name(
    key: str, value: Any, named: str, folder: Path, refused: Callable[[str], None]
) -> None:
    manifest = json.loads((folder / "fewstep.json").read_text())
    (folder / "fewstep.json").write_text(json.dumps({**manifest, key: value}))
    refused(named)
    refused("fewstep.json")


def test_a_student_whose_default_is_not_published_is_refused(folder: Path, refused: Callable[[str], None]) -> None:
    replace(Info.read(folder), step_times={2: [999.0, 499.0]}, default_steps=1).write(folder)
    refused("default_steps")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff\xfe"])
@pytest.mark.parametrize(
    "name", ["fewstep.json", "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]
)
def test_invalid_json_is_refused_by_file(name: str, text: str, tmp_path: Path, saved: Path) -> None:
    copied = shutil.copytree(saved / "plain-teacher", tmp_path / "x")
    (copied / name).write_text(text, encoding="latin-1")
    if name != "fewstep.json":
        (copied / "fewstep.json").unlink()  # as any diffusers pipeline; with it the digest refuses first
    with pytest.raises(BadInput, match=Path(name).name.replace(".", r"\.")):
        Generator.from_pretrained(copied)


def test_a_missing_key_is_named(folder: Path, refused: Callable[[str], None]) -> None:
    manifest = json.loads((folder / "fewstep.json").read_text())
    del manifest["sampler"]
    (folder / "fewstep.json").write_text(json.dumps(manifest))
    refused("sampler")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": 2}, "channels"),
        ({"codec": "vae"}, "codec"),
        ({"task": "sar-to-optical", "sar": {"channels": 1}}, "channels"),
        ({"task": "class-to-image", "labels": LABELS}, "classes"),
    ],
)
def test_a_manifest_that_tells_of_another_network_is_refused(
    change: dict[str, Any], named: str, folder: Path, refused: Callable[[str], None]
) -> None:
    replace(Info.read(folder), **change).write(folder)
    refused(named)


# --- damage


@pytest.mark.parametrize("keep", [0, 7, 100, -100])
@pytest.mark.parametrize("ours", [True, False], ids=["published", "any pipeline"])
def test_truncated_weights_are_refused(keep: int, ours: bool, folder: Path, refused: Callable[[str], None]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    if not ours:
        (folder / "fewstep.json").unlink()
    refused("unet")


def test_one_changed_byte_is_refused(folder: Path, refused: Callable[[str], None]) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused("sha256")


@pytest.mark.parametrize("change", ["absent", "missing tensor", "another shape"])
def test_weights_that_do_not_fill_the_network_are_refused(
    change: str, folder: Path, refused: Callable[[str], None]
) -> None:
    """diffusers alone would only warn, and draw from random numbers."""
    (folder / "fewstep.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    name = "conv_in.weight"
    value = tensors.pop(name)
    if change == "another shape":
        tensors[name] = value[:4].contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if change == "absent":
        (folder / WEIGHTS).unlink()
    refused("unet")


@pytest.mark.parametrize("part", ["unet", "scheduler", WEIGHTS, "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("ours", [True, False], ids=["published", "any pipeline"])
def test_a_missing_part_is_named(part: str, ours: bool, folder: Path, refused: Callable[[str], None]) -> None:
    _remove(folder / part)
    if not ours:
        (folder / "fewstep.json").unlink()
    refused(part.split("/")[0])


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_an_edited_part_is_refused(part: str, folder: Path, refused: Callable[[str], None]) -> None:
    (folder / part).write_text((folder / part).read_text().replace("16", "32").replace("0.02", "0.03"))
    refused(part)


def test_weights_that_the_manifest_does_not_list_are_refused(folder: Path, refused: Callable[[str], None]) -> None:
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    refused("not listed")


def test_pickles_are_never_opened(folder: Path, refused: Callable[[str], None]) -> None:
    (folder / "fewstep.json").unlink()
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused("safetensors")


# --- numbers that are none, and halves


def test_weights_that_are_not_finite_are_neither_opened_nor_written(folder: Path, tmp_path: Path) -> None:
    generator = untrained(describe())
    for value, dtype in ((float("nan"), torch.float32), (float("inf"), torch.float32), (1e6, torch.float16)):
        with torch.no_grad():
            generator.denoiser.network.conv_out.bias[0] = value  # type: ignore[union-attr]
        if value != 1e6:
            with pytest.raises(BadInput, match=r"conv_out.bias: got '1 values that are NaN or infinite"):
                generator.save_pretrained(tmp_path / "never")
            assert not (tmp_path / "never").exists()
        network: Any = generator.denoiser.network
        network.save_pretrained(folder / "unet")
        (folder / "fewstep.json").unlink(missing_ok=True)
        with pytest.raises(BadInput, match=rf"unet: conv_out.bias: got '1 values that are NaN or infinite.*{dtype}"):
            Generator.from_pretrained(folder, dtype=dtype)


def test_weights_beyond_float16_stay_float32(tmp_path: Path) -> None:
    """Group normalisation takes the scale out again: such a network works."""
    generator = untrained(describe())
    with torch.no_grad():
        generator.denoiser.network.conv_in.weight *= 1e6  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"unet: weights up to .* are beyond float16"):
        generator.save_pretrained(tmp_path / "large")
    assert {value.dtype for value in load_file(tmp_path / "large" / WEIGHTS).values()} == {torch.float32}
    again = Generator.from_pretrained(tmp_path / "large")
    assert torch.equal(again.sample([0], steps=2), generator.sample([0], steps=2))


def test_a_folder_of_half_precision_variants_opens(folder: Path, tmp_path: Path) -> None:
    (folder / "fewstep.json").unlink()
    before = Generator.from_pretrained(folder)
    for shards in ("10GB", "10KB"):
        network: Any = before.denoiser.network
        halves = torch.nn.Module.to(copy.deepcopy(network), torch.float16)
        shutil.copytree(folder, tmp_path / shards, ignore=lambda *_: ["diffusion_pytorch_model.safetensors"])
        halves.save_pretrained(tmp_path / shards / "unet", variant="fp16", max_shard_size=shards)
        files = [path.name for path in (tmp_path / shards / "unet").glob("*.safetensors")]
        assert files and all("fp16" in name for name in files) and (len(files) > 1) == (shards == "10KB")
        again = Generator.from_pretrained(tmp_path / shards)
        assert torch.equal(again.sample([0], steps=1), before.sample([0], steps=1))


def test_the_hub_is_asked_for_one_variant() -> None:
    both = ["unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model-00001-of-00002"]
    files = [f"{name}{variant}.safetensors" for name in both for variant in ("", ".fp16")]
    files += ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "unet/diffusion_pytorch_model.bin"]
    plain = set(filter_repo_objects(files, allow_patterns=FILES))
    assert {f"{name}.safetensors" for name in both} <= plain and not any("model.fp16" in name for name in plain)
    assert set(filter_repo_objects(files, allow_patterns=[*FILES, *FP16_FILES])) == set(files[:-1])


# --- replaced as a whole


def test_writing_over_an_older_folder_leaves_nothing_of_it(saved: Path, tmp_path: Path) -> None:
    """An adapter, a DiT with VAE, a patched U-Net without a pipeline, a plain one; what is not published stays."""
    folder = tmp_path / "x"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "log").write_text("kept")
    shutil.copytree(saved / "adapter-student", folder, dirs_exist_ok=True)
    for name in ("transformer-teacher", "sar-student", "plain-teacher"):
        Generator.from_pretrained(saved / name).save_pretrained(folder)
        expected = contents(saved / name)
        found = contents(folder)
        assert found.pop("training/log") == b"kept"
        assert found == expected
        (folder / "report.json").write_text("{}")  # measured on these weights, so gone with them
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


class PowerCut(OSError):
    pass


class Stopper:
    """An audit hook that fails the n-th change to the file system and all that follow, as if the process were gone."""

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self)  # there is no way to take one off again; left = None is asleep

    def __call__(self, event: str, args: Any) -> None:
        if self.left is not None and event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.left -= 1
            if self.left < 0:
                raise PowerCut(event)


@pytest.fixture(scope="module")
def stopper() -> Stopper:
    return Stopper()


@pytest.mark.parametrize("old", ["none", "plain-student", "class-student", "transformer-teacher", "adapter-student"])
def test_stopped_anywhere_the_folder_is_the_old_one_or_the_new_one_or_refused(
    old: str, saved: Path, tmp_path: Path, stopper: Stopper
) -> None:
    """plain-student has the new folder's very weights, and another scheduler and sampler."""
    folder, new = tmp_path / "x", saved / "plain-teacher"
    generator = Generator.from_pretrained(new)
    outcomes = []
    for stop in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        if old != "none":
            shutil.copytree(saved / old, folder)
        stopper.left = stop
        try:
            generator.save_pretrained(folder)
            break
        except PowerCut:
            pass
        finally:
            stopper.left = None
        found = find(tmp_path)
        assert set(found) <= {"x"}  # never the one on its way
        try:
            opened = Generator.from_pretrained(folder).info.name if found else "none"
            assert opened == old and (not found or contents(folder) == contents(saved / old))
            outcomes.append("old")
        except BadInput:
            outcomes.append("refused")
    generator.save_pretrained(folder)  # and what was left behind is no obstacle
    assert contents(folder) == contents(new)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert "old" in outcomes and ("refused" in outcomes) == (old != "none")


def test_an_error_leaves_the_old_folder(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ZeroDivisionError), staged(folder) as new:
        (new / "fewstep.json").write_text("{}")
        1 / 0  # noqa: B018
    assert contents(folder) == before and [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_published_folders_are_found_by_name(saved: Path) -> None:
    assert set(find(saved)) == set(FOLDERS)
    assert find(saved / "nowhere") == {}
