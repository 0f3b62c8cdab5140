"""Mistakes on the command line: one clear line, exit code 2, and nothing written."""

import pytest
import torch

from fused_margins.fewshot import process, trainer
from fused_margins.fewshot.cli import main

from .conftest import train

HUGE, ENDLESS = ("1" + zeros * "0" for zeros in (400, 5000))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --loss magnet --margin 1", "loss: magnet has no option 'margin', it takes alpha"),
        ("train --scale -1", "scale: Input should be greater than 0, got '-1'"),
        ("train --dataset imagenet", "dataset: expected one of cifar-fs, cub, cub-retrieval, digits"),
        ("train --classes 3 12", "classes: expected different values in [0, 10), got [3, 12]"),
        ("train --blocks 7", "blocks: 7 blocks halve 8 x 8 images to less than a pixel, at most 3 fit"),
        (
            "train --backend abacus",
            "backend: expected one of 'auto', 'cpu', 'cuda', 'triton', 'reference', got 'abacus'",
        ),
        ("train --device cuda:77", "device: 'cuda:77' cannot be used"),
        ("train --device meta", "device: 'meta' cannot be used"),
        ("train --preset cosine-imagenet", "preset: expected one of neg-cosine-digits"),
        ("train --loss triplet --negatives all", "loss: triplet: negatives: Input should be 'semihard'"),
        ("train --loss triplet --margin -0.1", "margin: Input should be greater than or equal to 0"),
        ("train --loss margin --beta -1", "beta: Input should be greater than 0"),
        ("train --margin nan", "margin: Input should be a finite number"),
        ("train --classes 0 1 2 --shots 1 999", "shots: expected fewer than the"),
        ("train --resume", "no run here"),
        ("train --resume --dry-run", "dry_run: it describes a training that has not begun"),
        ("train --samples-per-class 65", "samples_per_class: expected at most half of the 128 images of a batch"),
        ("train --epochs 0", "epochs: Input should be greater than or equal to 1, got '0'"),
        ("train --epochs {huge}", "epochs: Input should be less than or equal to 1000000, got '1000"),
        ("train --epochs {endless}", "epochs: Unable to parse input string as an integer, exceeded maximum"),
        ("train --epochs many", "epochs: Input should be a valid integer, unable to parse string as"),
        ("train --ways many", "an integer, got 'many'"),
        ("train --episodes {huge}", "episodes: Input should be less than"),
        ("train --threads 1000000000", "threads: Input should be less than or equal to 1024, got '1000000000'"),
        ("train --channels 1000000000", "channels: Input should be less than or equal to 100000, got '1000000000'"),
        ("train --channels 100000", "GiB are needed to train these weights"),
        ("train --embedding-size 100000 --loss triplet --memory 10000000", "GiB are needed"),
        ("train --loss triplet --memory {huge}", "loss: triplet: memory: Input should be less than"),
        ("train --loss magnet --samples-per-cluster 1000", "samples_per_cluster: expected at most 199, of which"),
        ("train --loss magnet --num-clusters {huge}", "loss: magnet: num_clusters: Input should be less than"),
        ("train --batch-size 100000 --samples-per-class 9999", "samples_per_class: expected at most 119, of which"),
        ("train --crop-padding 8", "crop_padding: expected fewer than the 8 pixels of a side, got 8"),
        (
            "train --perturbation 1e300",
            "perturbation: Input should be 0 or from 1e-38 to 1e38, as kernels compute in float32, got '1e300'",
        ),
        (
            "train --scale 1e-300",
            "scale: Input should be 0 or from 1e-38 to 1e38, as kernels compute in float32, got '1e-300'",
        ),
        ("train --backbone conv4 --blocks 3", "blocks: only convnet takes a number of blocks, not conv4, got '3'"),
        ("train --ways 5", "ways: digits has no novel classes for episodes"),
        ("train --ways 6 --classes 0 1 2 3 4", "ways: expected at most the 5 novel classes of digits"),
        ("sweep --seed 3", "seed: a study has several, give --seeds; got 3"),
        ("one-shot --dataset digits", "dataset: these protocols are of omniglot alone, got digits"),
        ("parity --seeds 0 --backend cpu", "backend: it is --backends that are compared, got cpu"),
        ("coarse-to-fine --labels fine", "labels: the training is on coarse labels, the judgement on fine ones"),
        ("parity --margin -0.9", "loss: which one are these options for?"),
        ("magnet --loss triplet", "loss: it is magnet that is compared with softmax and triplet, got triplet"),
        ("reproduce --parity --long", "parity, long: expected one of them, each is instead of the others"),
        ("train --los magnet", "unknown options: --los magnet; perhaps you meant --loss"),
        ("train --loss lion", "loss: expected one of softmax, margin-softmax"),
        ("train --margin", "--margin: expected one argument"),
        ("train --nonsense", "unknown options: --nonsense"),
        ("nonsense", "unknown command: nonsense; expected one of demo, data, "),
        ("trian", "unknown command: trian; perhaps you meant train"),
        ("evaluate", "the following arguments are required: PATH"),
        ("", "the following arguments are required: COMMAND"),
        ("sweep --margin nan", "margin.0: Input should be a finite number, got 'nan'"),
        ("sweep --margin 0 -0", "margin: expected one or more different finite numbers"),
        ("sweep --seeds -1", "seeds.0: Input should be greater than or equal to 0, got '-1'"),
        ("demo --seeds 1 1", "seeds: expected one or more different numbers, got"),
        ("parity --steps 0", "steps: Input should be greater than or equal to 1, got '0'"),
        ("sweep --preset magnet-digits", "loss: a sweep over margins is one of margin-softmax, got magnet"),
        ("sweep --labels coarse", "labels: a sweep over margins asks for novel fine classes"),
        ("sweep --classes 0 1 2 3 4 5", "asks for 5-way episodes, digits has 4 novel classes"),
        ("magnet --epochs 5", "warm_epochs: expected fewer than the 5 epochs, got 5"),
        ("magnet --held-out 0.1", "the test split is held out already"),
        ("parity --backends cpu cpu", "backends: expected two or more different ones"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(command.format(huge=HUGE, endless=ENDLESS).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert 100 * "0" not in error
    assert not any(word in error for word in ("pydantic", "TrainConfig", "Judging", "Backbone", "class '"))
    assert list(tmp_path.iterdir()) == []


def test_more_threads_than_a_machine_takes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "available_cores", lambda: 2)
    for command in (["train"], ["sweep", "--dry-run"]):
        assert main([*command, "--threads", "65", "--output", str(tmp_path / "out")]) == 2
        assert "threads: expected at most 64 on this machine, got 65" in capsys.readouterr().err


def test_memory_that_is_not_there_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    class Short(torch.nn.Module):
        def __init__(self, *args):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you ..."
            )

    monkeypatch.setattr(trainer, "_check_memory", lambda *args: None)
    monkeypatch.setattr(trainer, "Network", Short)
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "error: not enough memory: try a smaller batch_size" in capsys.readouterr().err


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run") == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        "half",
        {"epoch": 99},
        {"epoch": "a"},
        {"history": []},
        {},
        {"losses": ["a"], "epoch": 1},
        {"history": [{"epoch": 0}, {"epoch": 1}]},
        {"model": {}},
        {"model": []},
        {"optimizer": {}},
        {"generator": torch.zeros(3)},
    ],
)
def test_a_corrupt_checkpoint_is_one_line_and_changes_nothing(trained, capsys, contents, damage):
    folder = trained
    if damage == "half":
        data = (folder / "checkpoint.pt").read_bytes()
        (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    else:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | damage if damage else [state], folder / "checkpoint.pt")
    before = contents(folder)
    capsys.readouterr()
    for arguments in (["train", "--resume", "--output", str(folder)], ["evaluate", str(folder)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "checkpoint.pt: not a usable checkpoint" in error
        assert error.count("\n") == 1
        assert "Trainer" not in error
    assert contents(folder) == before


@pytest.mark.usefixtures("few_digits")
def test_a_run_that_diverges_can_be_looked_at_and_resumed(tmp_path, capsys):
    folder = tmp_path / "run"
    wild = ["--learning-rate", "1e30", "--similarity", "dot", "--no-normalize"]
    assert train(folder, *wild) == 2
    assert "training diverged" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(folder)]) == 2
    assert "training diverged" in capsys.readouterr().err
