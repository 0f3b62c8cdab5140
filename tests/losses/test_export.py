"""Predictions leave for where this library is not: graphs of torch's own operations, whatever the backend."""

import io
import warnings

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fused_margins import (
    AdaFaceLoss,
    ArcFaceLoss,
    MarginSoftmaxLoss,
    NegativeSoftmaxLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SoftTripleLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from tests.conftest import backends

HEADS = {
    "cosine": lambda backend: MarginSoftmaxLoss(3, 8, backend=backend),
    "learnable": lambda backend: MarginSoftmaxLoss(3, 8, learnable_scale=True, learnable_margin=True, backend=backend),
    "angular": lambda backend: ArcFaceLoss(3, 8, backend=backend),
    "dot": lambda backend: NegativeSoftmaxLoss(3, 8, backend=backend),
    "distance": lambda backend: MarginSoftmaxLoss(3, 8, similarity="negative_squared_euclidean", backend=backend),
}


class Classifier(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = nn.Linear(8, 8), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss.predictions(self.network(x))


def traced(model: nn.Module, x: Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shapes that Python looks at
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        return torch.jit.trace(model, x)


def exported(model: nn.Module, x: Tensor, strict: bool):
    return torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}, strict=strict).module()


def in_onnx(model: nn.Module, x: Tensor, dynamo: bool):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes={"x": {0: "rows"}})
            program.save(file)
        else:
            options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "rows"}}}
            torch.onnx.export(model, (x,), file, **options)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


of_torch = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")


@of_torch
@pytest.mark.parametrize("backend", backends("scores"))
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_graph_predicts_what_the_module_does(make, backend):
    model, x, other = Classifier(make(backend)).eval(), torch.randn(4, 8), torch.randn(7, 8)
    expected = model(other).detach()
    graph = exported(model, x, strict=False)
    assert "fused_margins" not in str(graph.graph)
    with torch.no_grad():
        without_gradients = traced(model, x)
    for function in (graph, traced(model, x), without_gradients):
        torch.testing.assert_close(function(other).detach(), expected)


@of_torch
@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
def test_onnx(similarity):
    model = Classifier(MarginSoftmaxLoss(3, 8, similarity=similarity, learnable_scale=True)).eval()
    x, other = torch.randn(4, 8), torch.randn(7, 8)
    expected = model(other).detach()
    torch.testing.assert_close(exported(model, x, strict=True)(other).detach(), expected)
    for dynamo in (False, True):
        torch.testing.assert_close(in_onnx(model, x, dynamo)(other), expected, rtol=1e-5, atol=1e-5)


LINEAR = {name: lambda make=make: make("auto") for name, make in HEADS.items()} | {
    "biased": lambda: MarginSoftmaxLoss(3, 8, logit_bias=torch.tensor([1.0, 2.0, 3.0])),
    "centers": lambda: SubCenterArcFaceLoss(3, 8),
    "soft-centers": lambda: SoftTripleLoss(3, 8, centers_per_class=2),
    "adaface": lambda: AdaFaceLoss(3, 8),
    "sphereface": lambda: SphereFaceLoss(3, 8, scale=0.3),
    "proxy-nca": lambda: ProxyNCALoss(3, 8),
    "proxy-anchor": lambda: ProxyAnchorLoss(3, 8),
}


@of_torch
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_head_leaves_as_a_linear_layer(make):
    loss, x, other = make(), torch.randn(4, 8), torch.randn(7, 8)
    with torch.no_grad():
        loss.weight.add_(3)  # far from the origin
    head = loss.to_linear()
    expected = loss.predictions(other).detach()
    assert isinstance(head.linear, nn.Linear)
    assert not any(p.requires_grad for p in head.parameters())
    for function in (head, exported(Named(head), x, strict=False), in_onnx(Named(head), x, dynamo=False)):
        torch.testing.assert_close(function(other), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        loss.weight.zero_()
    torch.testing.assert_close(head(other), expected, rtol=1e-4, atol=1e-4)  # a copy


class Named(nn.Module):
    """A head whose argument has the name that the exports above give it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
