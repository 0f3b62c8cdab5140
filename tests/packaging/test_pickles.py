"""Modules that version 0.1.0 pickled before it had its present folders load, and compute what they did."""

import base64
import lzma
import pickle

import pytest
import torch

import fused_margins

# Of every kind one, as a list: margin softmax with a learnable margin and scale and its special cases, the losses of
# easy positives, the magnet loss, a fitted index, a memory that has seen three samples.
PICKLED = (
    "XQAAAAT//////////wBAAQ54pLMiIo8ujoccTH91LPWJrkWCIqVx0IHYxvrVvg3VbdVL+ZfEHw6radFIkg/TTerwXJmc3UnQebVcdCqVc/a+"
    "H+qm2r+7L3dh3DXbKpyoWetlw9UZwdVVOinAZRooFYF2EKZmMR62Ah4FcbD1ib8EIUjZCfR/k6EjMrTXgXBZ0amuGVJtRTEtUWF344/xGJQc"
    "spBvW2GF/zLlyxrKjO5VuziGxTAiVNweuoMZKtxJVV1AkEzWnAplnxYQnJbS3Y+1Pregmy2aFny4tFKuycDHryjbXakXYBMU/QsPvX0ySvP+"
    "icwrGyqQ60bHKBzj3U/S3Nfd5Q7TbyoURKhvLbQy3BcWZjsOzHeqTnTp63LWvWLcBkjQdz2N1XqNnYw5ZTG0elK1pKxuYJ3Lixr9qaOF5a/N"
    "1v56LLoGl7Tb+94X452kShkrpzPdo3nkEXYCxdK9w5znBVSoQXIgPD3EHijMqgXy8OWYfQOEXk8voaIC49NaqCjvH0WmdD/2/laRGzxxf2wA"
    "/1Leudpk6XcKbddwj4LEBYPDPWLRvmVM30XeLmll+8CN17cNai1fhtIANRdbXJHMxFc29Vv5sMf85LfhEsn27qtpuUOM2ofxXA0hH5nAgaQf"
    "eBcUT3qbtLjD61vSutkfKlCMaeQy/BOm14gH2Oo8XBf3VUREDSkOIQAf9Dz11Q6QXxLzxQ3EU+qG6fQBASBmJ1Y1GyA5Zfk/sood189+bJsZ"
    "oVY8n2km+HH6TQ0b/hGOIappLyJ5AcmDBsxmGiUR/DOocv+e7JWoJ8MlTL1nYB8/Xyr3cXRZaOiwXgIYN6SrrrP76E4dX1d7tzsHuZ9BqxR7"
    "500Lg1SRx1wTORyYrZemg+dNlLlXjsDiF3LvWpHkvr2a1UjfJnYLVfYmEGC+Q7qlfB8ZIDAWAX4bEOTqti/SKXWcxyU46bxh/eXzCfnuRxza"
    "6CussYXybF7rqDjSqssZZSGh12y3qGHsRsHWXHnEkX36wnGGzfECFWfG23+qciYCK73/hCHfpD4fHv145Iw+BhBF1Auoae23rORkzC+s/KM6"
    "n5iwqC29D5bs3m5sXB0YtiQj8HKJmReSlSAXM/XS3GW+pnNdjB5lyrebTcPxMNWLcwBvqxOErqHEq+R/i9pc30nq+c3BDFFPln8fvY4tD/Il"
    "zccgefcxZ64zdC2gQ/c6JmhLzlCvdPLrg8GhMkJ36IQZUU6UERzdmOv5DQQfXluNz1HXDEEryW1K+k+oBaWhiyVisCy40YilKHjobV8LM6Pr"
    "hIEbDeA841ZBW29VjywxZwqblpl0DmKx8GIZ5xajw5jzWpGeWUtFhdYiZF4l9n49eXFokfh5fnuy45tNBMKDT1OQa0gse4qZNswcyE2FRSRI"
    "8qUtClDwdH7aGP3JHMRClCK1bC9/gsHNpcwGMilH3qe32vwJUGM82msu6brfDjf8gxzVV/SJtRWAZ6rQ1YcShXj970URnL7YU4AYJsIVtxbQ"
    "ShZg5At4MbQ5InL147gULP3mVc2vx50SX0WOdyDMlyhqtKcRdw9JkdkEuUN4zxhLMF4jhCkIIWxdkUE3qkoDdfLsTX+a59vlratXmYgpGow9"
    "eSYi0IuJdIEuB6pcOmszL1Uo1BygELEXWr9AnlqUmI2PwKwNyqA4JLBvBIAsgS2Y8/YYnOAyYcgm3cog32o10PACvAo9Mp6ykY1iQKfVKJEU"
    "d7lP6WFsbXjARYTpDA2vxm6ktpvZrkR4HWP+Y6kTz/4aQt86t4DWJghnu9TQZm7OSgxs0WG43TmlQDqQ4ZS4aHfTGux6zJaEvnWTijnDswTG"
    "syyGOwySR2/xumaLwxE+c41fjmHLhPh+2RJgZzq/RQnFrritfFJEaoqqxs/JeVZk9vcOT3fJTq4m4BI+exsKo1JJlmYWvXF35gIF2e61lyyt"
    "H6YqeP+U9/HGq2rrrJ37sBY8h09cIjJKwmJMqwzOzU5VNfxjyFtBkJW9X9392RBgJz16KBQNO6JlHok8SVGrVi+SxRDWnffzUEf3o7gzwaqc"
    "rxc8wAsttskPNH2yC0gGOfnVeFzaVwN8J3jFWtbzh6GsHuIeXK65S8rC1ieOnonTysOMjhwH6X8or6ZxIAnx7UrCenTq0KViSfOkenT3FSfq"
    "yC1FVICy5nyqwQ4qEDT5scWuAanxR6X0xdgBpigQ5hbk+ugfcTeKGBgmK1DYqAsEUHGyFIDvdipWMf4Ga87fkseUpd80dqwe6f/MVuoyYVMc"
    "mqN7kq4a8IIwMZFwyYE0O6E7h6cl4fUbEfIQalpyPH1apFliBOhxEDJqs8v5L2l4px+6d10PXDwtJWVx5OsP4FV/GT3J+5EVH8Pbwgdvm3hK"
    "S0GUFwuTvjWD+6VCg5gWjsvQAYzI5dUUdohHE3eM7bNMidvJRyIpHn3gSvVdI+1OEAYbGv/Ls/EQ"
)
EXPECTED = {
    "MarginSoftmaxLoss": 0.3888525366783142,
    "CosFaceLoss": 6.5733561515808105,
    "ArcFaceLoss": 0.8490714430809021,
    "NegativeMarginLoss": 0.0006034538964740932,
    "NegativeSoftmaxLoss": 0.23999518156051636,
    "NormalizedSoftmaxLoss": 0.0026939716190099716,
    "EasyPositiveTripletLoss": 0.0,
    "EasyPositiveMarginLoss": 0.4043312668800354,
    "EasyPositiveInfoNCELoss": 0.10707516968250275,
    "MagnetLoss": 0.0,
}


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    return {type(m).__name__: m for m in pickle.loads(lzma.decompress(base64.b64decode("".join(PICKLED))))}


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]])
    return x, torch.tensor([0, 0, 1, 1, 2])


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_are_what_they_were(modules, batch, name):
    assert type(modules[name]) is getattr(fused_margins, name)
    loss = modules[name](*batch)
    assert loss.item() == pytest.approx(EXPECTED[name], rel=1e-5)
    assert repr(modules[name]).startswith(f"{name}(")


def test_an_index_still_knows_its_clusters(modules):
    index = modules["MagnetIndex"]
    assert index.centroids.tolist() == [[0.0, 1.0], [4.0, 1.0]]
    assert index.knc_predict(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist() == [0, 7]
    assert index.sample_batch(2, 2).indices.shape == (4,)


def test_a_memory_still_holds_what_it_has_seen(modules, batch):
    memory = modules["CrossBatchMemory"]
    assert (memory.seen, memory.embeddings[:3].tolist()) == (3, [[1.0, 0.0], [1.0, pytest.approx(0.1)], [0.0, 1.0]])
    assert memory(*batch).item() == 0
    assert memory.seen == 8
