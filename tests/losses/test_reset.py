"""`reset_parameters`, the meta device, `to_empty`, state dicts: a module has what its constructor was given."""

import pytest
import torch

import fused_margins
from fused_margins import (
    AdaFaceLoss,
    CosFaceLoss,
    CrossBatchMemory,
    EasyPositiveInfoNCELoss,
    EasyPositiveMarginLoss,
    EasyPositiveTripletLoss,
    MagnetIndex,
    MagnetLoss,
    MarginSoftmaxLoss,
    ProxyAnchorLoss,
)

MARGINS, WEIGHTS = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
MODULES = {
    "margin-softmax": lambda: MarginSoftmaxLoss(
        4, 8, scale=10.0, learnable_scale=True, learnable_margin=True, margin=0.1
    ),
    "margin-of-classes": lambda: MarginSoftmaxLoss(4, 8, margin=MARGINS, learnable_margin=True),
    "margin-parameter": lambda: MarginSoftmaxLoss(4, 8, margin=torch.nn.Parameter(MARGINS.clone())),
    "adaface": lambda: AdaFaceLoss(4, 8),
    "proxies": lambda: ProxyAnchorLoss(4, 8),
    "cosface": lambda: CosFaceLoss(4, 8, learnable_margin=True),
    "radii": lambda: EasyPositiveMarginLoss(num_classes=4),
    "radius": lambda: EasyPositiveMarginLoss(),
    "memory": lambda: CrossBatchMemory(EasyPositiveTripletLoss(), 8, 5),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def spoilt(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            t.fill_(123)
    return module


def assert_as_made(module: torch.nn.Module, make) -> None:
    for name, t in make().state_dict().items():
        if name != "weight":
            assert torch.equal(module.state_dict()[name], t), name
    if hasattr(module, "weight"):
        assert module.weight.std().item() == pytest.approx(8**-0.5, rel=0.5)


@each_module
def test_reset_restores_what_the_constructor_was_given(make):
    module = spoilt(make())
    module.reset_parameters()
    assert_as_made(module, make)


@each_module
def test_a_module_made_without_memory(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    spoilt(module).reset_parameters()
    assert_as_made(module, make)


def test_every_module_with_parameters_or_buffers_can_be_reset():
    for module in (make() for make in MODULES.values()):
        assert callable(module.reset_parameters)
    for module in (MagnetLoss(), EasyPositiveTripletLoss()):
        assert not list(module.state_dict())


@pytest.mark.parametrize("options", [{"margin": MARGINS}, {"class_weight": WEIGHTS}], ids=["margin", "class_weight"])
def test_values_that_only_the_user_had(options):
    (name,), x, labels = options, torch.randn(8, 8), torch.arange(8) % 4
    loss = MarginSoftmaxLoss(4, 8, **options)
    loss.reset_parameters()
    assert torch.equal(getattr(loss, name), options[name])
    state, expected = loss.state_dict(), loss(x, labels)
    for moved in (loss.double(), loss.float(), loss.to("cpu")):
        assert moved(x.to(moved.weight.dtype), labels).isfinite()
    within = torch.nn.ModuleList([loss]).to_empty(device="cpu")
    loss.reset_parameters()
    with pytest.raises(RuntimeError, match=f"^{name}: expected values, got uninitialised memory"):
        loss(x, labels)
    within.load_state_dict({f"0.{n}": t for n, t in state.items()})
    assert torch.equal(loss(x, labels), expected)
    loss.to("meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=name):
        loss(x, labels)


def test_a_margin_that_learns_and_was_made_without_memory_has_to_be_loaded():
    options = {"margin": MARGINS, "learnable_margin": True}
    with torch.device("meta"):
        loss = MarginSoftmaxLoss(4, 8, margin=torch.empty(4), learnable_margin=True)
    loss = loss.to_empty(device="cpu")
    loss.reset_parameters()
    with pytest.raises(RuntimeError, match=r"^margin: expected values, got uninitialised memory"):
        loss(torch.randn(8, 8), torch.arange(8) % 4)
    loss.load_state_dict(MarginSoftmaxLoss(4, 8, **options).state_dict())
    assert loss(torch.randn(8, 8), torch.arange(8) % 4).isfinite()


def test_an_index_whose_memory_was_taken_is_not_fitted():
    index = MagnetIndex(2).fit(torch.randn(12, 3), torch.arange(12) % 2)
    index.double().float().to("cpu").sample_batch(2, 2)
    index.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="not fitted"):
        index.sample_batch(2, 2)


def test_an_index_is_left_alone_by_who_looks_at_buffers():
    index = MagnetIndex(2)
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), index])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    index.fit(torch.randn(12, 3), torch.arange(12) % 2)
    averaged.update_parameters(model)  # whose own index is not fitted
    assert not list(index.buffers())
    averaged.load_state_dict(
        {f"module.{n}": t for n, t in model.state_dict().items()} | {"n_averaged": torch.tensor(2)}
    )
    assert torch.equal(averaged.module[1].centroids, index.centroids)
    incomplete = {n: t for n, t in index.state_dict().items() if n != "variance"}
    with pytest.raises(RuntimeError, match=r"Missing key.*variance"):
        index.load_state_dict(incomplete)


@pytest.mark.parametrize("name", ["margin", "scale"])
def test_a_state_dict_with_a_tensor_for_a_number_and_back(name):
    of_number, of_tensor = MarginSoftmaxLoss(4, 8), MarginSoftmaxLoss(4, 8, **{f"learnable_{name}": True})
    expected = rf"{name}: expected a number, as this module has, got a tensor of shape \(\) in the state dict"
    with pytest.raises(RuntimeError, match=expected) as raised:
        of_number.load_state_dict(of_tensor.state_dict())
    assert len(str(raised.value).splitlines()) == 2  # torch's own first line, and this one
    with pytest.raises(RuntimeError, match=rf"0.{name}: expected a tensor of shape \(\), .*got a number") as raised:
        torch.nn.ModuleList([of_tensor]).load_state_dict(torch.nn.ModuleList([of_number]).state_dict())
    assert len(str(raised.value).splitlines()) == 2


def test_a_parameter_as_margin_learns_and_dtypes_stay():
    margin = torch.nn.Parameter(MARGINS.double())
    loss = MarginSoftmaxLoss(4, 8, margin=margin)
    assert loss.margin is margin
    loss(torch.randn(8, 8), torch.arange(8) % 4).backward()
    assert margin.grad.dtype == torch.float64
    assert MarginSoftmaxLoss(4, 8, margin=MARGINS.double()).margin.dtype == torch.float64
    assert MarginSoftmaxLoss(4, 8, margin=MARGINS.double(), learnable_margin=True).margin.dtype == torch.float64
    assert MarginSoftmaxLoss(4, 8, margin=torch.tensor([0, 1, 0, 1])).margin.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MarginSoftmaxLoss(10.0, 8), TypeError, "num_classes: expected an integer, got 10.0"),
        (lambda: MarginSoftmaxLoss(10, 8.0), TypeError, "embedding_size: expected an integer, got 8.0"),
        (
            lambda: MarginSoftmaxLoss(2, 8, margin=[0.1, 0.2]),
            TypeError,
            "margin: expected a number or a tensor, got list",
        ),
        (
            lambda: MarginSoftmaxLoss(2, 8, class_weight=[1.0, 2.0]),
            TypeError,
            r"class_weight: expected a tensor of shape",
        ),
        (
            lambda: MarginSoftmaxLoss(2, 8, class_weight=torch.ones(3)),
            ValueError,
            r"class_weight: expected shape \(2,\)",
        ),
        (lambda: MarginSoftmaxLoss(2, 8, margin=torch.ones(2, 1)), ValueError, r"margin: expected shape \(2,\)"),
        (lambda: MarginSoftmaxLoss(2, 8, margin=torch.ones(2).bool()), TypeError, "margin: expected a floating dtype"),
        (lambda: MarginSoftmaxLoss(2, 8, scale="30"), TypeError, "scale: expected a number, got str"),
        (lambda: MarginSoftmaxLoss(2, 8, scale=float("nan")), ValueError, "scale: expected a positive number"),
        (
            lambda: MarginSoftmaxLoss(2, 8, label_smoothing=1.5),
            ValueError,
            r"label_smoothing: expected a number in \[0, 1\]",
        ),
        (lambda: MarginSoftmaxLoss(2, 8, backend="gpu"), ValueError, "backend: expected one of 'auto', 'cpu'"),
        (lambda: MarginSoftmaxLoss(2, 8, ignore_index=None), TypeError, "ignore_index: expected an integer"),
        (lambda: MarginSoftmaxLoss(2, 8, learnable_scale=1), TypeError, "learnable_scale: expected True or False"),
        (lambda: MarginSoftmaxLoss(2, 8, margin_type="angular", margin=4.0), ValueError, "margin: expected radians"),
        (lambda: MarginSoftmaxLoss(2, 8, beyond_pi="hard"), ValueError, "beyond_pi: expected one of"),
        (lambda: MarginSoftmaxLoss(2, 8, margin_gradient="no"), ValueError, "margin_gradient: expected one of"),
        (lambda: MarginSoftmaxLoss(2, 8, margin=float("nan")), ValueError, "margin: expected .* float32, got nan"),
        (
            lambda: MarginSoftmaxLoss(2, 8, class_weight=torch.tensor([1.0, torch.inf])),
            ValueError,
            r"class_weight: expected finite values, got \[1.0, inf\]",
        ),
        (lambda: MagnetLoss(alpha=1e39), ValueError, r"alpha: expected a number in the range of float32, got 1e\+39"),
        (lambda: EasyPositiveTripletLoss(margin=1e39), ValueError, "margin: expected a number in the range of float32"),
        (lambda: EasyPositiveInfoNCELoss(temperature=1e-39), ValueError, "temperature: expected .* inverse float32"),
        (lambda: CosFaceLoss(10, 64, 0.35, 64), TypeError, "positional argument"),
        (
            lambda: EasyPositiveTripletLoss(generator=0),
            TypeError,
            "generator: expected a torch.Generator or None, got int",
        ),
        (lambda: EasyPositiveTripletLoss(margin="0.2"), TypeError, "margin: expected a number, got str"),
        (lambda: EasyPositiveTripletLoss(backend="CPU"), ValueError, "backend: expected one of"),
        (lambda: EasyPositiveMarginLoss(num_classes=2.5), TypeError, "num_classes: expected an integer, got 2.5"),
        (lambda: CrossBatchMemory(EasyPositiveTripletLoss(), 8, 8.0), TypeError, "size: expected an integer, got 8.0"),
        (lambda: MagnetLoss(alpha=None), TypeError, "alpha: expected a number, got NoneType"),
        (lambda: MagnetLoss(backend=None), ValueError, "backend: expected one of"),
        (lambda: MagnetIndex(2.5), TypeError, "clusters_per_class: expected an integer, got 2.5"),
        (lambda: MagnetIndex(2, generator=0), TypeError, "generator: expected a torch.Generator"),
        (lambda: MagnetIndex(2, backend="fast"), ValueError, "backend: expected one of"),
        (lambda: MagnetIndex(2).fit(torch.randn(6, 0), torch.arange(6)), ValueError, "embeddings: expected a width"),
    ],
)
def test_constructors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_sizes_of_a_head_are_all_that_goes_without_a_name():
    for name in ("MarginSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "NegativeMarginLoss", "NegativeSoftmaxLoss"):
        with pytest.raises(TypeError, match="positional argument"):
            getattr(fused_margins, name)(4, 8, 30.0)
