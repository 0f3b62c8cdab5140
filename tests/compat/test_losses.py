"""Losses of the drop-in equal theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, regularizers

from fused_margins.compat.pytorch_metric_learning import terms
from fused_margins.core.enums import Relation

from .oracle import (
    BATCH,
    DISTANCES,
    HEADS,
    OTHERS,
    PAIRS,
    PROXIES,
    REDUCERS,
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


@settings(max_examples=30)
@given(
    name=st.sampled_from(HEADS),
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 8),
    reducer=st.sampled_from(sorted(REDUCERS)),
    indices=st.sampled_from([None, "triplets", "pairs"]),
    of_embeddings=st.booleans(),
    of_weight=st.booleans(),
    number=st.floats(0.1, 1.0),
)
def test_heads_are_theirs(name, seed, rows, classes, reducer, indices, of_embeddings, of_weight, number):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    options = {"num_classes": classes, "embedding_size": 5, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if of_embeddings else {}
    options |= {"weight_regularizer": regularizers.ZeroMeanRegularizer(), "weight_reg_weight": 3} if of_weight else {}
    if name == "NormalizedSoftmaxLoss":
        options |= {"temperature": number}
    elif name in ("LargeMarginSoftmaxLoss", "SphereFaceLoss"):
        options |= {"margin": int(5 * number) + 1, "scale": number}
    else:
        options |= {"margin": number * (180 if name == "ArcFaceLoss" else 2) - (name == "CosFaceLoss"), "scale": 6}
    same(name, options, embeddings, labels, fused=True, indices_tuple=mined(indices, labels))


@settings(max_examples=80)
@given(
    name=st.sampled_from([*PAIRS, "GeneralizedLiftedStructureLoss"]),
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
    if not normalized:
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


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [1, 2], [0, 1, 1]])
def test_a_single_pair_of_either_kind_is_none_to_them(name, labels):
    references = {"ref_emb": BATCH[0][1 : 1 + len(labels)], "ref_labels": torch.tensor(labels)}
    same(name, {}, BATCH[0][:1], torch.tensor([0]), fused=True, **references)


@settings(max_examples=30)
@given(
    name=st.sampled_from(PROXIES),
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 8),
    reducer=st.sampled_from(sorted(set(REDUCERS) - {"class"})),
    indices=st.sampled_from([None, "triplets", "pairs"]),
    of_embeddings=st.booleans(),
    of_weight=st.booleans(),
    product=st.booleans(),
    number=st.floats(0.1, 3.0),
)
def test_losses_with_proxies_are_theirs(
    name, seed, rows, classes, reducer, indices, of_embeddings, of_weight, product, number
):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    options = {"num_classes": classes, "embedding_size": 5, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if of_embeddings else {}
    options |= {"weight_regularizer": regularizers.ZeroMeanRegularizer(), "weight_reg_weight": 3} if of_weight else {}
    options |= {"alpha": 4 * number, "margin": number / 9} if name == "ProxyAnchorLoss" else {"softmax_scale": number}
    if product:
        options["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        embeddings = embeddings / 4
    same(name, options, embeddings, labels, fused=True, indices_tuple=mined(indices, labels))


@settings(max_examples=60)
@given(
    name=st.sampled_from(OTHERS),
    seed=seeds,
    rows=sizes,
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    reducer=st.sampled_from(["default", "default", "mean", "sum", "above zero", "threshold", "nothing", "class"]),
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
        fused = reducer in ("default", "mean", "sum", "above zero")
    else:
        fused = known
    with of_any_number():
        same(name, options, embeddings, labels, fused=fused, **call)


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


class Spy:
    """An op that is heard."""

    def __init__(self, op, relations):
        self.op, self.relations = op, relations

    def run(self, call, *rest, **options):
        self.relations.append(call.relation)
        return self.op.run(call, *rest, **options)
