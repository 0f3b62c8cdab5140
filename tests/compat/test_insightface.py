"""insightface's heads and PartialFC_V2 against what theirs compute, written out: values, gradients, samples, files."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margins.backends import registry
from fused_margins.compat import convert
from fused_margins.compat.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2

B, C, D = 12, 9, 5
HEADS = {
    "ArcFace": (ArcFace(8.0, 0.5), "straight", 0.5),
    "ArcFace-negative": (ArcFace(8.0, -0.3), "straight", -0.3),
    "CosFace": (CosFace(8.0, 0.4), "exact", 0.4),
    "combined-arc": (CombinedMarginLoss(8.0, 1.0, 0.5, 0.0), "straight", 0.5),
    "combined-cos": (CombinedMarginLoss(8.0, 7.0, 99.0, 0.4), "exact", 0.4),
}
each_head = pytest.mark.parametrize(("head", "kind", "margin"), HEADS.values(), ids=HEADS)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, centres, labels; the first sample is near the far pole of its own class."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (B,), generator=generator)
    x[0] = -w[labels[0]] + 0.05
    return x.requires_grad_(), w.requires_grad_(), labels


def theirs(kind: str, margin: float, cosines: Tensor, labels: Tensor) -> Tensor:
    own = torch.zeros_like(cosines, dtype=torch.bool)
    rows = (labels != -1).nonzero()[:, 0]
    own[rows, labels[rows]] = True
    if kind == "exact":
        return 8 * (cosines - margin * own)
    shifted = torch.cos(cosines.detach().acos() + margin)  # also beyond pi, where it turns back
    return 8 * (cosines + torch.where(own, shifted - cosines.detach(), 0.0))


@each_head
@pytest.mark.parametrize("column", [False, True])
def test_heads_are_functions_of_cosines(batch, head, kind, margin, column):
    x, w, labels = batch
    cosines = F.normalize(x) @ F.normalize(w).T
    assert (cosines.detach()[0, labels[0]].acos() + margin > math.pi) == (margin > 0)
    labels[[2, 7]] = -1
    before, given = cosines.detach().clone(), labels.clone()
    ours = head(cosines, labels[:, None] if column else labels)
    expected = theirs(kind, margin, cosines, labels)
    torch.testing.assert_close(ours, expected)
    scale = torch.rand(B, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((t * scale).sum(), (x, w), retain_graph=True) for t in (ours, expected))):
        torch.testing.assert_close(a, b)
    assert torch.equal(cosines, before)
    assert torch.equal(labels, given)


def test_filtering_leaves_out_noisy_negatives(batch):
    x, w, labels = batch
    labels[[2, 7]] = -1
    cosines = F.normalize(x) @ F.normalize(w).T
    head = CombinedMarginLoss(8.0, 1.0, 0.0, 0.4, interclass_filtering_threshold=0.3)
    own = F.one_hot(labels.clamp(min=0), C).bool() & (labels != -1)[:, None]
    filtered = torch.where((cosines > 0.3) & ~own, 0.0, cosines)
    assert ((cosines > 0.3) & ~own)[2].any()
    expected = theirs("exact", 0.4, filtered, labels)
    torch.testing.assert_close(head(cosines, labels), expected)
    gradients = [
        torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (head(cosines, labels), expected)
    ]
    torch.testing.assert_close(*gradients)


class InPlace(torch.autograd.Function):
    """Cross entropy that overwrites the logits, as the one in their PartialFC_V2."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_().div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return -logits.gather(1, labels).log().mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        return (p - F.one_hot(labels[:, 0], p.shape[1])) / len(p) * grad, None


@each_head
def test_they_serve_where_logits_are_overwritten(batch, head, kind, margin):
    x, w, labels = batch
    cosines = (F.normalize(x) @ F.normalize(w).T).clamp(-1, 1)
    loss = InPlace.apply(head(cosines, labels[:, None]), labels[:, None])
    expected = F.cross_entropy(theirs(kind, margin, cosines, labels), labels)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(t, (x, w), retain_graph=True) for t in (loss, expected))):
        torch.testing.assert_close(a, b)


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_poles_are_finite(head, kind, margin, dtype):
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype, requires_grad=True)
    if dtype == torch.float32:
        cosines = (cosines.detach() * (1 + 2e-7)).requires_grad_()  # rounding brings products of unit vectors there
    logits = head(cosines, torch.tensor([0, 0]))
    logits.sum().backward()
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert (cosines.grad == 8).all()


@each_head
@pytest.mark.parametrize("sample_rate", [1.0, 0.6, 0.1])
def test_partial_fc(batch, monkeypatch, head, kind, margin, sample_rate):
    x, w, labels = batch
    module = PartialFC_V2(head, D, C, sample_rate).double()
    module.load_state_dict({"weight": w.detach()})
    problems = []
    resolve = registry.resolve
    monkeypatch.setattr(registry, "resolve", lambda b, problem: problems.append(problem.op) or resolve(b, problem))
    loss = module(x, labels[:, None])
    assert set(problems) <= {"contrast"}
    chosen = torch.arange(C) if sample_rate == 1 else module.weight_index
    assert torch.isin(labels, chosen).all()
    assert (chosen.diff() > 0).all()
    assert len(chosen) == max(int(sample_rate * C), len(labels.unique()))
    cosines = F.normalize(x) @ F.normalize(module.weight[chosen]).T
    columns = (chosen == labels[:, None]).int().argmax(1)
    expected = F.cross_entropy(theirs(kind, margin, cosines, columns), columns)
    torch.testing.assert_close(loss, expected)
    variables = (x, module.weight)
    for a, b in zip(*(torch.autograd.grad(t, variables, retain_graph=True) for t in (loss, expected))):
        torch.testing.assert_close(a, b)


def test_others_are_drawn_uniformly():
    module = PartialFC_V2(CosFace(), D, 20, sample_rate=0.25)
    x, labels, counts = torch.randn(3, D), torch.tensor([4, 9, 4]), torch.zeros(20)
    for _ in range(900):
        module._sampled(labels)
        counts[module._sampled(labels)] += 1
    assert (counts[[4, 9]] == 900).all()
    rest = counts[[i for i in range(20) if i not in (4, 9)]]  # 3 of 18
    assert (rest - 150).abs().max() < 4 * math.sqrt(900 / 6)
    module(x, labels).backward()
    assert (module.weight.grad.abs().sum(1) > 0).sum() == 5


def test_another_callable_gets_the_cosines(batch):
    x, w, labels = batch
    given = []

    class Mine(CosFace):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            given.append((logits.shape, labels.shape))
            return super().forward(logits, labels)

    heads = [Mine(8.0, 0.4), CombinedMarginLoss(8.0, 1.0, 0.0, 0.4, 0.99), lambda c, l: CosFace(8.0, 0.4)(c, l)]
    losses = []
    for head in [*heads, CosFace(8.0, 0.4)]:
        module = PartialFC_V2(head, D, C).double()
        module.load_state_dict({"weight": w.detach()})
        losses.append(module(x, labels))
    for loss in losses[:-1]:
        torch.testing.assert_close(loss, losses[-1])
    assert given == [((B, C), (B, 1))]
    filtering = CombinedMarginLoss(8.0, 1.0, 0.0, 0.4, 0.2)
    module = PartialFC_V2(filtering, D, C).double()
    module.load_state_dict({"weight": w.detach()})
    cosines = F.normalize(x) @ F.normalize(module.weight).T
    torch.testing.assert_close(module(x, labels), F.cross_entropy(filtering(cosines, labels), labels))
    assert module(x, labels) < losses[-1]


def test_embeddings_of_other_dtypes_and_half_precision(batch):
    x, _, labels = batch
    module, rounded = PartialFC_V2(ArcFace(), D, C), PartialFC_V2(ArcFace(), D, C, fp16=True)
    rounded.load_state_dict(module.state_dict())
    loss = module(x.float(), labels)
    assert torch.equal(module(x, labels), loss)  # as a backbone in autocast gives what the centres are not in
    torch.testing.assert_close(rounded(x, labels), loss, rtol=5e-3, atol=0)
    assert rounded(x, labels) != loss
    assert rounded(x, labels).dtype == torch.float32
    for size in (1e-6, 1e5):  # beyond what half precision holds
        long = (size * x.detach().float()).requires_grad_()
        of_long = rounded(long, labels)
        torch.testing.assert_close(of_long, loss, rtol=5e-3, atol=0)
        of_long.backward()
        assert long.grad.isfinite().all()
    assert list(module.state_dict()) == ["weight"]
    assert module.weight.std().item() == pytest.approx(0.01, rel=0.4)


def test_whoever_looks_at_a_head_sees_its_cosines(batch):
    x, _, labels = batch
    seen = []
    for change in (
        lambda head: head.register_forward_hook(lambda *call: seen.append(call)),
        lambda head: setattr(head, "forward", lambda cosines, labels: seen.append(1) or cosines * 0),
    ):
        module = PartialFC_V2(ArcFace(), D, C)
        change(module.margin_softmax)
        module(x.float(), labels)
        assert len(seen) == 1
        seen.clear()


def test_files_of_ranks_are_joined_and_cut():
    weight = torch.randn(11, D)
    for world_size in (1, 2, 4, 11):
        parts = convert.to_insightface({"weight": weight}, world_size)
        checkpoints = [{"epoch": 3, "state_dict_softmax_fc": part} for part in parts]
        for ranks in (parts, checkpoints):
            assert torch.equal(convert.from_insightface(ranks)["weight"], weight)
    PartialFC_V2(CosFace(), D, 11).load_state_dict(convert.from_insightface(parts))
    with pytest.raises(ValueError, match=r"ranks: expected \[3, 3, 3, 2\] classes, in the order of the ranks"):
        convert.from_insightface(convert.to_insightface({"weight": weight}, 4)[::-1])
    for ranks, message in (
        ([], "ranks: expected a list of one state dict a rank"),
        ({"weight": weight}, "ranks: expected a list"),
        ([{}], r"ranks\[0\]: expected an entry 'weight', got \[\]"),
        ([{"weight": weight}, {"weight": weight[:, 1:]}], rf"ranks\[1\]: expected width {D} as rank 0 has"),
        ([{"weight": weight[0]}], r"ranks\[0\]\['weight'\]: expected a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_insightface(ranks)
    with pytest.raises(ValueError, match="world_size: expected at most 11, got 12"):
        convert.to_insightface({"weight": weight}, 12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ArcFace(margin=28.6), ValueError, "margin: expected radians .*; degrees become radians"),
        (lambda: ArcFace(s=0), ValueError, "s: expected a positive number"),
        (lambda: CosFace(m="0.4"), TypeError, "m: expected a number"),
        (lambda: CombinedMarginLoss(64, 1.0, 28.6, 0.0), ValueError, "m2: expected radians"),
        (lambda: CombinedMarginLoss(64, 1.0, 0.5, -0.1), ValueError, "m1, m3: expected m1 = 1 with m3 = 0"),
        (lambda: CombinedMarginLoss(64, 0.9, 0.4, 0.0), ValueError, "m1, m3: expected m1 = 1 with m3 = 0"),
        (lambda: PartialFC_V2(64, D, C), TypeError, "margin_loss: expected a callable"),
        (lambda: PartialFC_V2(CosFace(), D, 0), ValueError, "num_classes: expected at least 1"),
        (lambda: PartialFC_V2(CosFace(), D, C, 0.0), ValueError, r"sample_rate: expected a number in \(0, 1\]"),
        (lambda: CosFace(m=float("nan")), ValueError, "m: expected a number in the range of float32, got nan"),
        (
            lambda: CombinedMarginLoss(8.0, 1.0, 0.0, 0.4, float("nan")),
            ValueError,
            "interclass_filtering_threshold: expected a number in the range of float32",
        ),
        (lambda: PartialFC_V2(CosFace(), D, C, fp16=1), TypeError, "fp16: expected True or False"),
        (
            lambda: CosFace()(torch.zeros(2, 3), torch.tensor([0, 3])),
            IndexError,
            r"labels: expected values in \[0, 3\)",
        ),
        (lambda: CosFace()(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, "labels: expected shape"),
        (lambda: CosFace()([1.0], torch.zeros(3).long()), TypeError, "logits: expected a tensor"),
        (
            lambda: PartialFC_V2(CosFace(), D, C)(torch.zeros(2, D), torch.tensor([0, -1])),
            IndexError,
            r"local_labels: expected values in \[0, 9\).*, got -1 in row 1",
        ),
        (
            lambda: PartialFC_V2(CosFace(), D, C)(torch.zeros(2, D, device="meta"), torch.tensor([0, 1])),
            ValueError,
            r"embeddings: expected the device of the loss's weight \(cpu\), got meta; .*: loss.to\('meta'\)",
        ),
    ],
)
def test_what_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_step_of_training_learns():
    torch.manual_seed(0)
    labels = torch.arange(64) % C
    backbone, module = nn.Linear(C, D), PartialFC_V2(CombinedMarginLoss(16.0, 1.0, 0.2, 0.0), D, C, sample_rate=0.8)
    optimizer = torch.optim.SGD([*backbone.parameters(), *module.parameters()], lr=0.5)
    losses = []
    for _ in range(30):
        loss = module(backbone(F.one_hot(labels, C).float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_sample_of_a_class_elsewhere_is_filtered_in_every_column():
    head = CombinedMarginLoss(10.0, 1.0, 0.0, 0.25, interclass_filtering_threshold=0.8)
    logits = head(torch.tensor([[0.9, 0.5, 0.85], [0.9, 0.5, 0.85]]), torch.tensor([-1, 0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 5.0, 0.0], [6.5, 5.0, 0.0]]))
