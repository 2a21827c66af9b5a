"""Feature spaces: the shipped ones are as good as they say, and bad input is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distillers.data import open_data
from distillers.errors import BadInput
from distillers.evaluation.features import FeatureCard, FeatureNet, accuracy, load_features, main, train_features

EUROSAT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eurosat"


def small(keep_scale: bool = False) -> FeatureNet:
    torch.manual_seed(0)
    return FeatureNet(FeatureCard(name="small", labels=("a", "b"), size=32, width=8, keep_scale=keep_scale)).eval()


@pytest.mark.parametrize("name", ["eurosat-landcover", "shapes"])
def test_a_shipped_space_is_small_and_says_how_good_it_is(name: str) -> None:
    net = load_features(name)
    assert isinstance(net, FeatureNet) and net.card.name == name and not net.training
    assert net.card.accuracy is not None and net.card.accuracy > 0.93 and net.card.n_test == 2000
    assert sum(p.numel() for p in net.parameters()) < 600_000
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, net.num_features)
    assert f"{100 * net.card.accuracy:.1f} %" in net.card.describe()


def test_the_shapes_space_has_the_accuracy_in_its_card() -> None:
    net = load_features("shapes")
    assert isinstance(net, FeatureNet) and net.card.accuracy is not None
    data = open_data("shapes", size=32, split="test", objects=1)
    assert accuracy(net, data, 500) == pytest.approx(net.card.accuracy, abs=0.01)


def test_the_land_cover_space_has_the_accuracy_in_its_card() -> None:
    if not EUROSAT.is_dir():
        pytest.skip("EuroSAT is not at ../shared/data/eurosat")
    net = load_features("eurosat-landcover")
    assert isinstance(net, FeatureNet) and net.card.accuracy is not None
    data = open_data("images", path=EUROSAT, split="test")
    assert data.labels == net.card.labels
    assert accuracy(net, data, 500) == pytest.approx(net.card.accuracy, abs=0.03)


def test_training_learns_is_reproducible_and_survives_the_folder(tmp_path: Path) -> None:
    train, test = (open_data("shapes", size=32, split=split) for split in ("train", "test"))
    card, losses = FeatureCard(name="tiny", size=32, width=8), []
    nets = [
        train_features(
            train, test, card, iterations=100, batch=32, n_test=200, progress=lambda i, n, loss: losses.append(loss)
        )
        for _ in range(2)
    ]
    assert len(losses) == 200 and losses[:100] == losses[100:] and np.mean(losses[90:100]) < np.mean(losses[:10])
    assert nets[0].card.accuracy is not None and nets[0].card.accuracy > 0.1  # chance is 1/24
    nets[0].save(tmp_path)
    again, pictures = load_features(tmp_path), test.items(range(8))["image"]
    assert again.card == nets[0].card and torch.equal(again(pictures), nets[0](pictures))  # as stored, so as measured
    assert str(nets[0].card.accuracy)[:4] in (tmp_path / "config.json").read_text()
    assert "held-out" in (tmp_path / "README.md").read_text()


def test_a_larger_picture_is_shrunk_unless_the_scale_is_kept() -> None:
    pictures = torch.rand(2, 3, 96, 96) * 2 - 1
    shrunk = torch.nn.functional.interpolate(pictures, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(small()(pictures), small()(shrunk), atol=1e-6)
    kept = small(keep_scale=True)
    assert not torch.allclose(kept(pictures), kept(shrunk), atol=1e-3)
    assert kept(pictures[:, :, :8, :8]).shape == (2, 128)  # smaller ones are enlarged in either case


def test_named_folders_are_found_in_the_given_root_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small()
    net.card = replace(net.card, name="found")
    net.save(tmp_path / "features-shapes")
    assert load_features("shapes", tmp_path).card.name == "found"
    assert load_features("shapes").card.name == "shapes"
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    assert load_features("shapes").card.name == "found"


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="eurosat-landcover, shapes, inception"):
        load_features("imagenet")
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(BadInput, match=r"none\.pth.*download"):
        load_features("inception")
    net = small()
    net.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_features(tmp_path)
    net.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 16}))  # another network than the weights
    with pytest.raises(BadInput):
        load_features(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput):
        load_features(tmp_path)


def test_unlabelled_data_cannot_train_a_classifier() -> None:
    train, test = open_data("shapes"), open_data("shapes", split="test")
    test.labels = ()
    with pytest.raises(BadInput, match="labelled"):
        train_features(train, test, FeatureCard(name="x"), iterations=1)


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shapes", "--out", str(tmp_path / "f"), "--iterations", "2"])
    assert load_features(tmp_path / "f").card.iterations == 2
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eurosat", "--out", str(tmp_path / "g")])
