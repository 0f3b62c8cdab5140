"""Outliers of sub-center ArcFace are theirs."""

import pytest
import torch

from fused_margins.compat.pytorch_metric_learning import losses

from .oracle import pair

OPTIONS = {"num_classes": 6, "embedding_size": 5, "sub_centers": 3}


def batch(rows=80, dtype=torch.float64):
    """Of six classes the fourth has no sample."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (rows,), generator=generator)
    return torch.randn(rows, 5, generator=generator, dtype=dtype), labels + (labels >= 3)


@pytest.mark.parametrize("threshold", [40, 75, 180])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outliers_and_dominant_centers_are_theirs(threshold, dtype):
    ours, theirs = pair("SubCenterArcFaceLoss", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "argmax", None)  # theirs calls it
        (got, centers) = ours.get_outliers(*batch(dtype=dtype), threshold)
    want, their_centers = theirs.get_outliers(*batch(dtype=dtype), threshold)
    assert got.tolist() == want.tolist()
    assert (len(want) == 0) == (threshold == 180)
    present = [0, 1, 2, 4, 5]
    torch.testing.assert_close(centers[:, present], their_centers[:, present], rtol=0, atol=0)
    assert not centers[:, 3].any()  # theirs has there what was in memory
    assert centers.dtype == ours.W.dtype == theirs.W.dtype == dtype
    assert not centers.requires_grad


def test_the_centers_are_left_out_where_asked_for():
    """Theirs returns them all the same."""
    ours, theirs = pair("SubCenterArcFaceLoss", **OPTIONS)
    assert isinstance(theirs.get_outliers(*batch(), return_dominant_centers=False), tuple)
    for loss in (ours, losses.SubCenterArcFaceLoss(**OPTIONS, margin=200)):  # the second is left to theirs
        loss.load_state_dict(ours.state_dict())
        found = loss.get_outliers(*batch(), return_dominant_centers=False)
        assert torch.equal(found, theirs.get_outliers(*batch())[0])


def test_labels_of_no_class_are_left_to_them():
    ours, theirs = pair("SubCenterArcFaceLoss", **OPTIONS)
    x, labels = batch()
    for changed in (labels - 1, labels + 1, labels.double()):
        assert torch.equal(ours.get_outliers(x, changed)[0], theirs.get_outliers(x, changed)[0])
