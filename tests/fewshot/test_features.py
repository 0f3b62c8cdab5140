"""Files of features: what they hold trains and is judged as images are, and what is wrong with one is said."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fused_margins.fewshot.cli import main
from fused_margins.fewshot.datasets import load, make_task
from fused_margins.fewshot.datasets.features import Features, read_features, write_features
from fused_margins.fewshot.metrics import mean_average_precision_at_r, nearest_others, recall_at_k
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.studies import reproduce
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer
from fused_margins.fewshot.trials import task_of


def _features(classes=12, samples=9, width=6, **arrays):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(samples)
    centres = torch.randn(classes, width, generator=generator)
    features = centres[labels] + 0.5 * torch.randn(len(labels), width, generator=generator)
    return Features(features, labels, tuple(f"c{i:02}" for i in range(classes)), **arrays)


@pytest.fixture
def file(tmp_path):
    """Twelve classes of nine samples, a third of each for testing, three coarse classes."""
    split = torch.tensor([0, 0, 2]).repeat(36)
    coarse = torch.arange(12).repeat_interleave(9) % 3
    path = tmp_path / "few.safetensors"
    write_features(path, _features(split=split, coarse=coarse, coarse_names=tuple("xyz")), {})
    return path


def test_a_file_comes_back_as_it_was_written(file):
    features, expected = read_features(file), _features()
    assert torch.equal(features.features, expected.features)
    assert (features.class_names, features.coarse_names) == (expected.class_names, tuple("xyz"))
    training, held_out = load(f"features:{file}").values()
    assert (len(training), len(held_out), training.shape) == (72, 36, (6, 1, 1))
    torch.testing.assert_close(training.pixels()[:, :, 0, 0], expected.features.view(-1, 3, 6)[:, :2].flatten(0, 1))
    assert training.checksum() != held_out.checksum()


def test_three_kinds_of_files_hold_the_same(file, tmp_path):
    features = read_features(file)
    split = np.array(["train", "val", "test"])[features.split.numpy()]
    np.save(tmp_path / "few.npy", features.features.numpy())
    np.save(tmp_path / "few.labels.npy", features.labels.numpy())
    np.save(tmp_path / "few.split.npy", features.split.numpy())
    np.savez(tmp_path / "few.npz", features=features.features, labels=features.labels + 7, split=split)
    for name in ("few.npy", "few.npz"):
        other = read_features(tmp_path / name)
        for array in ("features", "labels", "split"):
            assert torch.equal(getattr(other, array), getattr(features, array)), (name, array)
    assert read_features(tmp_path / "few.npz").class_names[0] == "7"


def test_without_a_split_classes_are_split_by_name(tmp_path):
    write_features(tmp_path / "a.safetensors", _features(), {})
    task = make_task(load(f"features:{tmp_path / 'a.safetensors'}"))
    assert not set(task.training.class_names) & set(task.novel.class_names)
    assert len(task.training.class_names) + len(task.novel.class_names) + len(task.validation.class_names) == 12


def test_a_split_by_class_renumbers_the_classes_of_each(tmp_path):
    split = (torch.arange(12) >= 8).long().repeat_interleave(9) * 2
    write_features(tmp_path / "a.safetensors", _features(split=split), {})
    task = make_task(load(f"features:{tmp_path / 'a.safetensors'}"))
    assert task.novel.class_names == ("c08", "c09", "c10", "c11")
    assert task.novel.labels.unique().tolist() == [0, 1, 2, 3]


GOOD = {"features": torch.randn(8, 3), "labels": torch.arange(8) % 4}
BAD = [
    ({"labels": torch.arange(7)}, r"labels: expected integers \(8,\), got int64 \(7,\)"),
    ({"labels": torch.randn(8)}, r"labels: expected integers \(8,\), got float32"),
    ({"labels": torch.zeros(8, dtype=torch.int64)}, "labels: expected two or more classes, got one"),
    ({"labels": torch.arange(8)}, "labels: expected a class with more than one sample, each of them has one"),
    ({"features": torch.randn(8, 3, 1)}, r"features: expected floating point \(N, D\), got torch.float32 \(8, 3, 1\)"),
    ({"features": torch.ones(8, 3, dtype=torch.int64)}, "features: expected floating point"),
    ({"features": torch.randn(8, 0)}, r"features: expected floating point \(N, D\), got torch.float32 \(8, 0\)"),
    ({"features": torch.full((8, 3), torch.nan)}, "features: expected finite numbers, row 0 has others"),
    ({"features": torch.full((8, 3), 1e30)}, "features: expected a length that float32 can square, row 0 is longer"),
    ({"features": torch.full((8, 3), 1e200, dtype=torch.float64)}, "features: expected a length that float32 can"),
    ({"features": torch.zeros(8, 3)}, "features: expected rows that differ, all of them are equal"),
    ({"split": torch.arange(8)}, "split: expected train, val, test or 0, 1, 2, got 3"),
    ({"group": torch.randn(8)}, "group: expected integers"),
    ({"coarse": torch.arange(8) // 4}, "coarse: expected one coarse class for each class, 0 has several"),
    ({"features": None}, "expected features, found labels"),
]


@pytest.mark.parametrize(("arrays", "reason"), BAD)
def test_a_bad_file_is_named_with_the_reason(arrays, reason, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file({name: t for name, t in (GOOD | arrays).items() if t is not None}, path)
    with pytest.raises(UserError, match=f"bad.safetensors: {reason}"):
        read_features(path)


def test_a_file_that_is_cut_or_of_another_kind_is_named(file, tmp_path):
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"few.safetensors: not a readable file of features"):
            read_features(file)
    objects = np.array([{}, {}], dtype=object)
    np.save(tmp_path / "pickled.npy", objects)
    np.save(tmp_path / "pickled.labels.npy", np.arange(2))
    np.savez(tmp_path / "pickled.npz", features=objects, labels=np.arange(2))
    for name, reason in (
        ("pickled.npy", "not a readable"),
        ("pickled.npz", "not a readable"),
        ("a.pt", "expected a f"),
    ):
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read_features(tmp_path / name)
    whole = (tmp_path / "pickled.npz").read_bytes()
    for damaged in (whole[:300], whole[:100] + bytes(40) + whole[140:]):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged.npz: not a readable file of features"):
            read_features(tmp_path / "damaged.npz")
    with pytest.raises(UserError, match=r"none.npz: No such file"):
        read_features(tmp_path / "none.npz")
    np.save(tmp_path / "alone.npy", np.ones((2, 2)))
    with pytest.raises(UserError, match=r"alone.labels.npy: No such file"):
        read_features(tmp_path / "alone.npy")
    write_features(tmp_path / "training.safetensors", _features(split=torch.zeros(108, dtype=torch.int64)), {})
    with pytest.raises(UserError, match=r"training.safetensors: split: there is nothing in test"):
        load(f"features:{tmp_path / 'training.safetensors'}")


def test_class_names_that_are_not_those_of_the_labels_are_refused(tmp_path):
    path = tmp_path / "names.safetensors"
    for names, reason in (
        (json.dumps(["a", "b"]), "labels: expected numbers of the file's class names"),
        (json.dumps(["a", "b", "c", "a"]), "labels: expected class names that differ"),
        ("[" * 100_000, "not a readable file of features"),
    ):
        save_file(GOOD, path, {"class_names": names})
        with pytest.raises(UserError, match=f"names.safetensors: {reason}"):
            read_features(path)


def test_a_linear_map_is_trained_on_features(file, tmp_path):
    run = Run(tmp_path / "run")
    options = ["--output", str(run.folder), "--epochs", "8", "--episodes", "20", "--validation-episodes", "20"]
    options += ["--batch-size", "16", "--learning-rate", "0.05"]
    assert main(["train", "--features", str(file), *options, "--classes", *map(str, range(8))]) == 0
    config, figures = run.config(), run.result()["figures"]
    assert (config.dataset, config.backbone.name) == (f"features:{file}", "linear")
    assert figures["novel_4way_1shot_centroid"] > 0.5
    assert figures["accuracy"] > 0.5
    assert run.result()["stopped_early"] == "8 epochs are too few to tell"
    assert all("validation" in row for row in run.read_metrics())
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "linear" in page


@pytest.mark.parametrize("loss", ["triplet", "magnet"])
def test_other_losses_and_coarse_labels_train_an_mlp(loss, file, tmp_path):
    run = Run(tmp_path / "run")
    options = ["--output", str(run.folder), "--epochs", "6", "--labels", "coarse", "--loss", loss, "--batch-size", "24"]
    more = ["--clusters-per-class", "2"] if loss == "magnet" else ["--samples-per-class", "8"]
    assert main(["train", "--features", str(file), "--backbone", "mlp", "--channels", "16", *options, *more]) == 0
    assert run.result()["figures"]["recall@1"] > 0.5


def test_what_features_have_not_is_refused(file, tmp_path, capsys):
    for options, reason in (
        (["--backbone", "conv4"], "backbone: conv4 takes images; features take linear or mlp"),
        (["--image-size", "32"], "image_size: features have none, got 32"),
        (["--validation-episodes", "5", "--features", str(tmp_path / "x.npy")], "x.npy: No such file"),
    ):
        assert main(["train", "--features", str(file), "--output", str(tmp_path / "run"), *options]) == 2
        assert reason in capsys.readouterr().err


def test_a_resumed_training_on_features_has_the_same_numbers(file, tmp_path, capsys):
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    options = ["--features", str(file), "--epochs", "4", "--validation-episodes", "10", "--batch-size", "16"]
    assert main(["train", *options, "--output", str(whole.folder)]) == 0
    config = whole.config()
    task = task_of(config)
    trainer = Trainer(config, task.training, task.for_validation)
    cut.folder.mkdir()
    cut.save_config(config)
    trainer.train(cut, stop=lambda: trainer.steps_done >= 7)
    assert main(["train", "--resume", "--output", str(cut.folder)]) == 0
    assert cut.read_metrics() == whole.read_metrics()
    assert cut.result()["figures"] == whole.result()["figures"]


def test_neighbours_of_the_own_group_do_not_count():
    generator = torch.Generator().manual_seed(1)
    embeddings, groups = torch.randn(60, 4, generator=generator), torch.arange(60) // 3
    labels = torch.randint(3, (20,), generator=generator).repeat_interleave(3)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    similarity[groups[:, None] == groups] = -torch.inf
    order = similarity.argsort(dim=1, descending=True)[:, :57]
    assert torch.equal(nearest_others(embeddings, 5, groups=groups), order[:, :5])
    assert torch.equal(nearest_others(embeddings, 250, groups=groups)[:, :57], order)  # by a product, then padded
    assert (nearest_others(embeddings, 250, groups=groups)[:, 57:] == -1).all()
    hits = labels[order] == labels[:, None]
    assert recall_at_k(embeddings, labels, (1,), groups=groups)["recall@1"] == float(hits[:, 0].double().mean())
    precisions = []
    for row in hits:
        mates = int(row.sum())
        precisions.append(sum(int(row[: k + 1].sum()) / (k + 1) for k in range(mates) if row[k]) / mates)
    value = mean_average_precision_at_r(embeddings, labels, groups=groups)
    assert value == pytest.approx(float(np.mean(precisions)))


def test_signs_have_tracks_and_parents(tmp_path):
    labels = torch.arange(43).repeat_interleave(12)
    group, split = torch.arange(len(labels)) // 3, torch.tensor([0, 0, 2, 0]).repeat_interleave(3).repeat(43)
    names = tuple(f"{i:05}" for i in range(43))
    path = tmp_path / reproduce.SIGNS
    write_features(path, Features(torch.randn(len(labels), 4), labels, names, split, group), {})
    parents = make_task(load(f"gtsrb-parents:{path}"))
    assert (len(parents.training.class_names), len(parents.training.coarse_names)) == (40, 5)
    assert "00013" not in parents.training.class_names
    assert parents.training.coarse_names[int(parents.training.coarse_labels[0])] == "speed limit"
    assert parents.held_out.groups is not None
    tracks = make_task(load(f"gtsrb-tracks:{path}"))
    assert not set(tracks.training.labels.tolist()) & set(tracks.held_out.labels.tolist())
    assert tracks.training.coarse_names == names
    names_of_studies = [study.name for study in reproduce.feature_studies(tmp_path)]
    assert names_of_studies == [f"{s}-gtsrb-{kind}" for kind in ("parents", "tracks") for s in ("positives", "magnet")]
    with pytest.raises(UserError, match=r"features: expected caltech101.safetensors or gtsrb.safetensors in .*none"):
        reproduce.feature_studies(tmp_path / "none")
    write_features(path, Features(torch.randn(len(labels), 4), labels, names, 0 * split, group), {})
    for kind in ("parents", "tracks"):
        with pytest.raises(UserError, match="split: there is nothing in test"):
            load(f"gtsrb-{kind}:{path}")
    write_features(path, Features(torch.randn(len(labels), 4), labels, names), {})
    with pytest.raises(UserError, match=r"gtsrb.safetensors: expected a split by track"):
        load(f"gtsrb-parents:{path}")
