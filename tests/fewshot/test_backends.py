"""A training asks a backend for what its loss calls, and for nothing else."""

import dataclasses

import pytest

from fused_margins import doctor
from fused_margins.backends import registry
from fused_margins.fewshot import trainer
from fused_margins.fewshot.config import InfoNCE, Magnet, MarginSoftmax, Softmax, TrainConfig, Triplet
from fused_margins.fewshot.objectives import available, calls_of, of_all
from fused_margins.fewshot.terminal import UserError


@pytest.fixture
def a_gpu(monkeypatch):
    """The registry as it is beside a GPU: cuda and triton are there, and refuse what their kernels cannot run."""
    why_not = {"cuda": lambda device: None, "triton": lambda device: None, "cpu": lambda device: "runs on a CPU"}
    backends = [dataclasses.replace(b, why_not=why_not.get(b.name, b.why_not)) for b in registry.BACKENDS]
    monkeypatch.setattr(registry, "BACKENDS", backends)


@pytest.mark.usefixtures("a_gpu")
def test_each_loss_finds_the_gpu_backends_that_have_its_ops():
    assert available("cuda", calls_of(MarginSoftmax())) == ["cuda", "triton"]
    assert available("cuda", calls_of(Triplet(positives="easy", negatives="random"))) == ["cuda", "triton"]
    assert available("cuda", calls_of(Triplet(positives="easy", negatives="hard"))) == ["triton"]
    assert available("cuda", calls_of(InfoNCE())) == ["triton"]
    assert available("cuda", calls_of(Magnet())) == []
    assert of_all("cuda", [Softmax(), InfoNCE()]) == ["triton"]


@pytest.mark.usefixtures("a_gpu")
def test_a_training_is_refused_for_its_own_ops_alone():
    config = TrainConfig(backend="triton", device="cuda", loss=MarginSoftmax())
    trainer._check_backend(config, 64, 64)
    with pytest.raises(UserError, match="backend 'triton' cannot run this magnet: has no kernel for magnet"):
        trainer._check_backend(config.but(loss=Magnet()), 64, 64)
    with pytest.raises(UserError, match="backend 'cuda' cannot run this contrast: takes up to 1024 columns"):
        trainer._check_backend(config.but(backend="cuda"), 5000, 64)


def test_a_gpu_on_which_nothing_was_checked_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "_losses", lambda *_: iter(()))
    assert doctor.check("cpu")[1]
    assert not doctor.check("cuda")[1]
