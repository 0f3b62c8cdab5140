"""The log that TensorBoard reads: it begins with the first point, and a resumed run purges what it will write again."""

import sys
import types

import pytest

from fused_margins.fewshot.tensorboard import tensorboard_log


class Writer:
    """Keeps points as TensorBoard does: a new writer hides those from its `purge_step` on."""

    points: dict[str, dict[int, float]]

    def __init__(self, folder, purge_step):
        self.folder = folder
        self.points = LOGS.setdefault(folder, {})
        for series in self.points.values():
            for step in [step for step in series if step >= purge_step]:
                del series[step]

    def add_scalar(self, name, value, step):
        assert step not in self.points.setdefault(name, {}), "a doubled point"
        self.points[name][step] = value

    def close(self):
        pass


LOGS: dict[str, dict[str, dict[int, float]]] = {}


@pytest.fixture(autouse=True)
def _fake_writer(monkeypatch):
    LOGS.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))


def test_a_resumed_run_doubles_no_point(tmp_path):
    with tensorboard_log(tmp_path) as log:
        for step in range(10):
            log.step(step, 1.0, 0.1)
    with tensorboard_log(tmp_path, steps_done=6) as log:  # the checkpoint was older than the log
        for step in range(6, 12):
            log.step(step, 2.0, 0.1)
        log.figures(12, {"nmi": 0.5})
    with tensorboard_log(tmp_path, steps_done=12) as log:  # finished already: judged anew
        log.figures(12, {"nmi": 0.75})
    (points,) = LOGS.values()
    assert list(points["train/loss"].items()) == [(step, 1.0 if step < 6 else 2.0) for step in range(12)]
    assert points["evaluation/nmi"] == {12: 0.75}


def test_a_run_that_is_refused_keeps_the_log_that_is_there(tmp_path):
    with tensorboard_log(tmp_path) as log:
        log.step(0, 1.0, 0.1)
    with pytest.raises(RuntimeError, match="refused"), tensorboard_log(tmp_path):
        raise RuntimeError("refused")
    assert LOGS[str(tmp_path / "tensorboard")]["train/loss"] == {0: 1.0}
