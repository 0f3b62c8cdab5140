"""Run folders: whole files or none, and clear words about damaged ones."""

import json
import os

import pytest
import torch

from fused_margins.fewshot import runs
from fused_margins.fewshot.config import TrainConfig
from fused_margins.fewshot.runs import Run, replacing, write_json
from fused_margins.fewshot.terminal import UserError


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_trace(tmp_path, contents):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    before = contents(tmp_path)

    def fail_midway():
        with replacing(path) as temporary:
            temporary.write_text('{"a": ')
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_midway()
    assert contents(tmp_path) == before
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert contents(tmp_path) == before


def test_a_write_that_succeeds_replaces(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_json(path, 1)
    write_json(path, 2)
    assert json.loads(path.read_text()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path):
    path = tmp_path / "report.txt"
    runs.write_text(path, "old " * 100_000)  # more than a reader buffers
    with open(path) as reader:
        assert reader.read(4) == "old "
        runs.write_text(path, "new")
        assert reader.read() == "old " * 99_999
    assert path.read_text() == "new"


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, contents):
    run = Run.create(tmp_path / "run", TrainConfig())
    run.save_checkpoint({"epoch": 1})
    before = contents(run.folder)
    with pytest.raises(AttributeError):
        run.save_checkpoint({"epoch": lambda: None})
    assert contents(run.folder) == before


def test_one_process_at_a_time_works_in_a_run(tmp_path):
    with Run(tmp_path / "run").locked():
        with pytest.raises(UserError, match="output: another process is at work in"), Run(tmp_path / "run").locked():
            pass
        with Run(tmp_path / "other").locked():
            pass
    with Run(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Invalid JSON"),
        ('{"epochz": 1}', "epochz: Extra inputs"),
        ('{"epochs": 0}', "epochs: Input should be"),
        ("[]", r"settings: Input should be an object, got \[\]"),
        ('{"backbone": 3}', "backbone: Input should be an object, got 3"),
        ("\udcff{", "not text"),
    ],
)
def test_a_damaged_configuration_names_file_and_reason(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=rf"config\.json: .*{reason}"):
        Run(tmp_path).config()


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no run here"):
        Run(tmp_path / "nowhere").config()
    Run.create(tmp_path, TrainConfig())
    with pytest.raises(UserError, match=r"no checkpoint\.pt"):
        Run(tmp_path).load_checkpoint(lambda state: None)


def _truncate(data):
    return data[: len(data) // 2]


def _flip_a_bit_of_a_weight(data):
    place = data.index(torch.tensor([500.0]).numpy().tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "not a zip file"),
        (_flip_a_bit_of_a_weight, "its checksum does not match"),
        (lambda data: b"", "not a zip file"),
        (lambda data: b"hello" * 100, "not a zip file"),
    ],
)
def test_a_damaged_checkpoint_names_file_and_reason_and_changes_nothing(tmp_path, contents, damage, reason):
    run = Run.create(tmp_path / "run", TrainConfig())
    run.append_metrics({"epoch": 0})
    run.save_checkpoint({"weight": torch.arange(1000.0)})
    run.checkpoint_path.write_bytes(damage(run.checkpoint_path.read_bytes()))
    before = contents(run.folder)
    restored = []
    with pytest.raises(UserError, match=rf"checkpoint\.pt: not a usable checkpoint: .*{reason}"):
        run.load_checkpoint(restored.append)
    assert not restored
    assert contents(run.folder) == before


def test_whichever_bit_flips_the_checkpoint_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", TrainConfig())
    run.save_checkpoint({"weight": torch.arange(3.0), "epoch": 1})
    data = run.checkpoint_path.read_bytes()
    run.load_checkpoint(lambda state: None)
    for place in range(0, 8 * len(data), 61):
        flipped = data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]
        run.checkpoint_path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"checkpoint\.pt: not a usable checkpoint"):
            run.load_checkpoint(lambda state: None)


def test_a_checkpoint_of_an_earlier_version_has_the_checksums_of_its_archive(tmp_path):
    run = Run.create(tmp_path / "run", TrainConfig())
    torch.save({"weight": torch.arange(1000.0)}, run.checkpoint_path)
    restored = []
    run.load_checkpoint(restored.append)
    assert torch.equal(restored[0]["weight"], torch.arange(1000.0))
    run.checkpoint_path.write_bytes(_flip_a_bit_of_a_weight(run.checkpoint_path.read_bytes()))
    with pytest.raises(UserError, match=r"checksum of .* does not match"):
        run.load_checkpoint(restored.append)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trap"),))

    run = Run.create(tmp_path / "run", TrainConfig())
    torch.save({"weight": Trap()}, run.checkpoint_path)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        run.load_checkpoint(lambda state: None)
    assert not (tmp_path / "trap").exists()


def test_metrics_are_cut_to_what_a_checkpoint_knows(tmp_path):
    run = Run(tmp_path)
    assert run.read_metrics() == []
    for epoch in range(4):
        run.append_metrics({"epoch": epoch})
    with open(run.metrics_path, "a") as file:
        file.write('{"epoch": 4, "lo')  # the machine went down here
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 5 is not JSON"):
        run.read_metrics()
    run.write_metrics([{"epoch": 0}, {"epoch": 1}, {"epoch": 2}])
    assert run.read_metrics() == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]


def test_damaged_notes_are_named(tmp_path):
    run = Run(tmp_path)
    run.usage_path.write_text('{"seconds": "long"}')
    with pytest.raises(UserError, match=r"usage\.json: expected numbers"):
        run.usage()
    for text in (b"\xff", b"{", b"[" * 100_000, b"[]"):
        run.result_path.write_bytes(text)
        with pytest.raises(UserError, match=r"report\.json: (not JSON|expected an object)"):
            run.result()
    run.metrics_path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        run.read_metrics()


def test_a_temporary_file_belongs_to_one_process(tmp_path):
    with runs.replacing(tmp_path / "a.txt") as temporary:
        assert str(os.getpid()) in temporary.name
        assert temporary.parent == tmp_path  # so that replacing it is atomic
        temporary.write_text("x")
