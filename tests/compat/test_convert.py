"""State dicts and settings of pytorch-metric-learning's losses make losses that return what theirs return."""

import pytest
import torch
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning import losses as pml
from torch import nn

import fused_margins
from fused_margins.compat import convert

C, D = 7, 5
SIZES = {"num_classes": C, "embedding_size": D}
HEADS = {
    "ArcFaceLoss": {"margin": 28.6, "scale": 16},
    "CosFaceLoss": {"margin": 0.2, "scale": 16},
    "NormalizedSoftmaxLoss": {"temperature": 0.2},
    "SubCenterArcFaceLoss": {"margin": 20.0, "scale": 16, "sub_centers": 2},
    "SoftTripleLoss": {"la": 8, "gamma": 0.2, "margin": 0.1, "centers_per_class": 3},
    "SphereFaceLoss": {"margin": 3, "scale": 0.5},
    "ProxyNCALoss": {"softmax_scale": 3},
    "ProxyAnchorLoss": {"margin": 0.2, "alpha": 8},
}
PAIRS = {"NTXentLoss": {"temperature": 0.3}, "SupConLoss": {"temperature": 0.2}, "MultiSimilarityLoss": {"alpha": 3}}
of_theirs = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@of_theirs
@pytest.mark.parametrize(("name", "options"), [*HEADS.items(), *PAIRS.items()])
def test_settings_and_state_dicts_go_both_ways(name, options):
    theirs = getattr(pml, name)(**(SIZES if name in HEADS else {}), **options)
    ours = getattr(fused_margins, name)(**convert.settings_from_pytorch_metric_learning(theirs))
    x, labels = torch.randn(12, D), torch.arange(12) % 4
    if name in HEADS:
        centers = options.get("sub_centers", options.get("centers_per_class"))
        ours.load_state_dict(convert.from_pytorch_metric_learning(theirs.state_dict(), centers_per_class=centers))
    torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-4, atol=1e-5)
    if name in HEADS:
        (entry,) = theirs.state_dict()
        back = convert.to_pytorch_metric_learning(ours.state_dict(), name=entry)
        assert back[entry].is_contiguous()
        theirs.load_state_dict(back, strict=True)


def test_a_whole_model_is_converted():
    model = nn.ModuleDict({"network": nn.Linear(D, D), "head": pml.CosFaceLoss(C, D)})
    state = convert.from_pytorch_metric_learning(model.state_dict())
    nn.ModuleDict({"network": nn.Linear(D, D), "head": fused_margins.CosFaceLoss(C, D)}).load_state_dict(state)
    assert state["head.weight"].data_ptr() != model["head"].W.data_ptr()


@of_theirs
def test_what_cannot_be_converted():
    weight = torch.zeros(C, D)
    for state, message in (
        ({"other": weight}, r"state_dict: expected an entry 'W' or 'proxies', got \['other'\]"),
        ({"W": weight[0]}, "W: expected a matrix"),
        ({"W": weight, "proxies": weight}, "state_dict: expected one weight a module, got 'weight' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_pytorch_metric_learning(state)
    with pytest.raises(ValueError, match="W: expected a multiple of 3 columns, got 5"):
        convert.from_pytorch_metric_learning({"W": weight}, centers_per_class=3)
    with pytest.raises(ValueError, match=r"state_dict\['weight'\]: expected a matrix"):
        convert.to_pytorch_metric_learning({"weight": weight[None]}, name="proxies")
    with pytest.raises(TypeError, match="state_dict: expected a state dict, got Tensor"):
        convert.from_pytorch_metric_learning(weight)
    learnt = fused_margins.CosFaceLoss(C, D, learnable_scale=True).state_dict()
    with pytest.raises(ValueError, match="state_dict: expected no entry but 'weight'"):
        convert.to_pytorch_metric_learning(learnt)
    with pytest.raises(ValueError, match="name: expected one of 'W', 'proxies', 'fc', got 'weight'"):
        convert.to_pytorch_metric_learning({"weight": weight}, name="weight")
    with pytest.raises(TypeError, match=r"loss: expected one of .*ArcFaceLoss.*, got TripletMarginLoss"):
        convert.settings_from_pytorch_metric_learning(pml.TripletMarginLoss())
    with pytest.raises(TypeError, match="loss: expected a loss of pytorch-metric-learning, got NTXentLoss"):
        convert.settings_from_pytorch_metric_learning(fused_margins.NTXentLoss())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reducer": reducers.SumReducer()},
            "expected the reducer that it has by default, MeanReducer, got SumReducer",
        ),
        ({"weight_regularizer": regularizers.LpRegularizer()}, "expected no weight_regularizer, got LpRegularizer"),
        ({"embedding_regularizer": regularizers.LpRegularizer()}, "expected no embedding_regularizer, got"),
    ],
)
def test_settings_that_would_be_lost_are_refused(options, message):
    with pytest.raises(ValueError, match=f"loss: {message}"):
        convert.settings_from_pytorch_metric_learning(pml.ArcFaceLoss(**SIZES, **options))


def test_a_distance_that_would_be_lost_is_refused():
    theirs = pml.NTXentLoss(distance=distances.CosineSimilarity(power=2))
    with pytest.raises(ValueError, match="loss: expected the distance that it has by default"):
        convert.settings_from_pytorch_metric_learning(theirs)
