"""The program about optimizers trains heads that learn, and shows those that do not."""

import pytest

pytest.importorskip("sklearn")

from benchmarks import optimizers
from benchmarks.optimizers import SETTINGS, digits, train
from fused_margins import CosFaceLoss


def test_a_head_learns_by_adam_and_is_stuck_at_a_large_step() -> None:
    data = digits()._replace(epochs=8)
    by_name = {setting.name: setting for setting in SETTINGS}
    right, length = train(data, CosFaceLoss, by_name["Adam 0.01"])
    stuck, stuck_length = train(data, CosFaceLoss, by_name["SGD 0.5"])
    assert right > 90 > stuck
    assert stuck_length > 100 * length


def test_the_table_has_a_row_for_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "train", lambda *args: (97.25, 1.5))
    lines = optimizers.table(digits()._replace(epochs=0)).splitlines()
    assert len(lines) == 2 + len(SETTINGS)
    assert lines[2] == "| SGD 0.5 | 97.2 (1.5) | 97.2 (1.5) | 97.2 (1.5) | 97.2 (1.5) |"
