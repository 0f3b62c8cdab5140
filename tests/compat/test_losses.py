"""Losses of the drop-in equal theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, regularizers

from fused_margins.backends.budget import within_memory_budget
from fused_margins.compat.pytorch_metric_learning import calls, terms
from fused_margins.core.enums import Relation

from .oracle import (
    BATCH,
    DISTANCES,
    HEADS,
    OTHERS,
    PAIRS,
    PROXIES,
    REDUCERS,
    REGULARIZERS,
    TRIPLETS,
    assert_equal,
    mined,
    of_any_number,
    pair,
    run,
    same,
    seeds,
    sizes,
)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=10)
@given(
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 8),
    reducer=st.sampled_from(sorted(REDUCERS)),
    indices=st.sampled_from([None, "triplets", "pairs"]),
    of_embeddings=st.booleans(),
    of_weight=st.sampled_from(sorted(REGULARIZERS)),
    number=st.floats(0.1, 1.0),
)
def test_heads_are_theirs(name, seed, rows, classes, reducer, indices, of_embeddings, of_weight, number):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    options = {"num_classes": classes, "embedding_size": 5, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if of_embeddings else {}
    options |= {"weight_regularizer": REGULARIZERS[of_weight](), "weight_reg_weight": 3}
    if name == "NormalizedSoftmaxLoss":
        options |= {"temperature": number}
    elif name == "SoftTripleLoss":
        options |= {"centers_per_class": 1 + seed % 3, "la": 6, "gamma": number, "margin": 0.3 - number}
    elif name in ("LargeMarginSoftmaxLoss", "SphereFaceLoss"):
        options |= {"margin": int(5 * number) + 1, "scale": number}
    else:
        options |= {"margin": number * (180 if name == "ArcFaceLoss" else 2) - (name == "CosFaceLoss"), "scale": 6}
    same(name, options, embeddings, labels, fused=True, indices_tuple=mined(indices, labels))


@pytest.mark.parametrize("name", [*PAIRS, "GeneralizedLiftedStructureLoss"])
@settings(max_examples=30)
@given(
    indices=st.sampled_from([None, None, "triplets", "pairs", "some"]),
    seed=seeds,
    rows=sizes,
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    reducer=st.sampled_from(sorted(REDUCERS)),
    regularized=st.booleans(),
    normalized=st.booleans(),
    temperature=st.floats(0.3, 3.0),
    shared=st.booleans(),
)
def test_pair_losses_are_theirs(
    name, indices, seed, rows, columns, classes, dtype, reducer, regularized, normalized, temperature, shared
):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    dtype = torch.int64 if reducer == "class" else dtype  # labels index the reducer's weights
    labels = torch.randint(classes, (rows,), generator=generator).to(dtype)
    options = {"temperature": temperature, "reducer": REDUCERS[reducer]()}
    if name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss"):
        options = {"reducer": REDUCERS[reducer]()}
        options |= {"alpha": temperature, "beta": 3 * temperature} if name == "MultiSimilarityLoss" else {}
        options |= {"distance": distances.CosineSimilarity()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if regularized else {}
    if name == "GeneralizedLiftedStructureLoss" and indices is None and not normalized:
        options |= {"distance": distances.LpDistance(normalize_embeddings=shared), "pos_margin": temperature}
    elif not normalized:
        options["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        embeddings = embeddings / 4  # so that no loss comes near to zero, where reducers would flip
    call = {}
    if columns is not None:
        columns = rows if shared else columns
        call["ref_emb"] = torch.randn(columns, 5, generator=generator, dtype=torch.float64) / 4
        # One tensor for both sides of labels says that a row is its own reference.
        call["ref_labels"] = labels if shared else torch.randint(classes, (columns,), generator=generator)
    if reducer == "anchor" and columns is not None and columns > rows:
        reducer = "mean"  # theirs counts the positives of references as anchors
        options["reducer"] = None
    if indices is not None:
        call["indices_tuple"] = mined(indices, labels, call.get("ref_labels"), generator)
    with of_any_number():
        same(name, options, embeddings, labels, fused=True, **call)


@pytest.mark.parametrize("name", [*PAIRS, "GeneralizedLiftedStructureLoss"])
@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [1, 2], [0, 1, 1]])
def test_a_single_pair_of_either_kind_is_none_to_them(name, labels):
    references = {"ref_emb": BATCH[0][1 : 1 + len(labels)], "ref_labels": torch.tensor(labels)}
    same(name, {}, BATCH[0][:1], torch.tensor([0]), fused=True, **references)


@pytest.mark.parametrize("name", PROXIES)
@settings(max_examples=20)
@given(
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 8),
    reducer=st.sampled_from(sorted(set(REDUCERS) - {"class"})),
    indices=st.sampled_from([None, "triplets", "pairs"]),
    of_embeddings=st.booleans(),
    of_weight=st.sampled_from(sorted(REGULARIZERS)),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    product=st.booleans(),
    number=st.floats(0.1, 3.0),
)
def test_losses_with_proxies_are_theirs(
    name, seed, rows, classes, reducer, indices, of_embeddings, of_weight, dtype, product, number
):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels = labels.to(dtype if name == "ProxyNCALoss" else torch.int64)  # theirs refuses others
    options = {"num_classes": classes, "embedding_size": 5, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if of_embeddings else {}
    options |= {"weight_regularizer": REGULARIZERS[of_weight](), "weight_reg_weight": 3}
    options |= {"alpha": 4 * number, "margin": number / 9} if name == "ProxyAnchorLoss" else {"softmax_scale": number}
    if product:
        options["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        embeddings = embeddings / 4
    same(name, options, embeddings, labels, fused=True, indices_tuple=mined(indices, labels))


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=30)
@given(
    seed=seeds,
    rows=sizes,
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    reducer=st.sampled_from(
        ["default", "default", "mean", "sum", "above zero", "threshold", "nothing", "class", "of each part"]
    ),
    indices=st.sampled_from([None, None, "triplets", "pairs", "some"]),
    distance=st.sampled_from(["default", "plain", "squared", "cosine", "dot", "city"]),
    regularized=st.booleans(),
    learned=st.booleans(),
    number=st.floats(0.1, 2.0),
)
def test_losses_of_neighbours_and_triplets_are_theirs(
    name, seed, rows, columns, classes, dtype, reducer, indices, distance, regularized, learned, number
):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    options = {"reducer": REDUCERS[reducer](), "distance": DISTANCES[distance]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if regularized else {}
    if name == "NCALoss":
        options |= {"softmax_scale": number}
    else:
        options |= {"margin": number}
    if name == "MarginLoss":
        options |= {"nu": 0.3, "beta": 0.8, "learn_beta": learned, "num_classes": classes if number < 1 else None}
        labels = labels.long()  # which index beta
    else:
        labels = labels.to(dtype if reducer != "class" else torch.int64)  # which index the reducer's weights
    call = {}
    if columns is not None:
        call["ref_emb"] = torch.randn(columns, 5, generator=generator, dtype=torch.float64)
        call["ref_labels"] = torch.randint(classes, (columns,), generator=generator).to(labels.dtype)
    if indices is not None:
        call["indices_tuple"] = mined(indices, labels, call.get("ref_labels"), generator)
    known = distance in (("default", "squared", "cosine", "dot") if name == "NCALoss" else set(DISTANCES) - {"city"})
    if name == "NCALoss":
        fused = known and rows > 1
    elif indices is None:
        fused = reducer in ("default", "mean", "sum", "above zero", "of each part")
    else:
        fused = known
    with of_any_number():
        same(name, options, embeddings, labels, fused=fused, **call)


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("reducer", ["default", "mean", "sum", "above zero", "of each part"])
@pytest.mark.parametrize("columns", [None, 7])
def test_all_triplets_are_reduced_as_theirs_are(name, reducer, columns):
    call = {} if columns is None else {"ref_emb": BATCH[0][:columns].cos(), "ref_labels": BATCH[1][:columns]}
    options = {"nu": 0.3, "learn_beta": True, "num_classes": 4} if name == "MarginLoss" else {}
    # So small a margin that some triplets are at zero.
    same(name, {"reducer": REDUCERS[reducer](), "margin": 0.02, **options}, *BATCH, fused=True, **call)


@pytest.mark.parametrize("seed", [10, 22])
def test_as_many_triplets_are_above_zero_as_theirs_are(seed):
    """In float32 there is one of 170 thousand here whose d_ip + margin rounds to its d_in."""
    x, labels = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)), torch.arange(128) % 10
    ours, theirs = pair("TripletMarginLoss")
    torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TRIPLETS)
def test_a_hinge_of_exactly_zero_has_no_gradient(name):
    """Products of whole numbers are exact, and many differ by the margin."""
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    options = {"margin": 1.0, "reducer": REDUCERS["sum"](), "distance": DISTANCES["dot"]()}
    same(name, options | ({"beta": 4.0} if name == "MarginLoss" else {}), x, torch.tensor([0, 1, 0, 1, 0]), fused=True)


@pytest.mark.parametrize("name", [*PAIRS, *TRIPLETS])
@pytest.mark.parametrize("number", [1, 20])
def test_many_listed_pairs_are_left_to_them_as_their_matrix_is_smaller(name, number):
    indices = tuple(t[:number] for t in mined("triplets", BATCH[1]))  # 20 pairs of each kind, 5 wide, of 12 x 12
    same(name, {}, *BATCH, fused=number == 1 or name == "NTXentLoss", indices_tuple=indices)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "NCALoss"])
@pytest.mark.parametrize("columns", [None, 400])
def test_few_positives_are_gathered(name, columns):
    """Of 300 rows nearly every class has one or two, and some rows have none."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(200, (300,), generator=generator)
    call = {}
    if columns is not None:
        call["ref_emb"] = torch.randn(columns, 5, generator=generator, dtype=torch.float64)
        call["ref_labels"] = torch.randint(200, (columns,), generator=generator)
    ours, theirs = pair(name)
    relations = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "contrast", Spy(terms.contrast, relations))
        got = run(ours, embeddings, labels, **call)
    assert relations == [Relation.DIFFERENT]
    assert_equal(got, run(theirs, embeddings, labels, **call), 1e-7 if name == "NCALoss" else 1e-9, 1e-9)


@pytest.mark.parametrize("indices", [None, "triplets"])
def test_few_samples_of_many_proxies_are_gathered(indices):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (40,), generator=generator)
    ours, theirs = pair("ProxyAnchorLoss", num_classes=2000, embedding_size=5)
    call = {"indices_tuple": mined(indices, labels)}
    want = run(theirs.double(), embeddings, labels, **call)
    relations = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "contrast", Spy(terms.contrast, relations))
        assert_equal(run(ours.double(), embeddings, labels, **call), want, 1e-9, 1e-9)
    assert relations == [Relation.DIFFERENT]


class Spy:
    """An op that is heard."""

    def __init__(self, op, relations):
        self.op, self.relations = op, relations

    def run(self, call, *rest, **options):
        self.relations.append(call.relation)
        return self.op.run(call, *rest, **options)


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, "GeneralizedLiftedStructureLoss", *OTHERS])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 3), (6, 1), (6, 6)])
@pytest.mark.parametrize("reducer", ["default", "nothing"])
def test_one_row_one_class_and_a_class_for_each_row(name, rows, classes, reducer):
    head = name in (*HEADS, *PROXIES)
    options = {"reducer": REDUCERS[reducer]()} | ({"num_classes": classes, "embedding_size": 5} if head else {})
    fused = (name != "NCALoss" or rows > 1) and (name not in TRIPLETS or reducer == "default")
    same(name, options, BATCH[0][:rows], torch.arange(rows) % classes, fused=fused)


@pytest.mark.parametrize("columns", [None, 9])
def test_a_matrix_of_distances_is_made_of_some_rows_at_a_time(columns):
    call = {} if columns is None else {"ref_emb": BATCH[0][:columns].cos(), "ref_labels": BATCH[1][:columns]}
    ours, theirs = pair("GeneralizedLiftedStructureLoss")
    want = run(theirs, *BATCH, **call)
    shapes = []
    compute = distances.LpDistance.compute_mat

    def seen(self, x, y):
        shapes.append(len(x))
        return compute(self, x, y)

    for budget, rows in ((1, 1), (2000, 2000 // (4 * 8 * (columns or 12))), (10**9, 12)):
        shapes.clear()
        with pytest.MonkeyPatch.context() as patch, within_memory_budget(budget):
            patch.setattr(distances.LpDistance, "compute_mat", seen)
            patch.setitem(calls._OF_EUCLIDEAN_DISTANCES.methods, "compute_mat", seen)
            assert_equal(run(ours, *BATCH, **call), want, 1e-9, 1e-9)
        assert max(shapes) == rows
