"""Which optimizers train a cosine head, and what goes wrong where it does not learn.

    python -m benchmarks.optimizers [--features FILE.safetensors ...]

Accuracy on held-out samples, and the mean length of the embeddings at the end, of heads with their default margins on
handwritten digits (a small network) and on files of features (a linear map), for optimizers, learning rates, initial
lengths of the class weights, clipped gradients, and a batch norm as the last layer of the network.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_margins import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss, parameter_groups
from fused_margins.fewshot.datasets.features import read_features

BATCH = 128
HEADS: dict[str, Callable[..., nn.Module]] = {
    "softmax, scale 10": partial(NormalizedSoftmaxLoss, scale=10.0),
    "softmax, scale 30": partial(NormalizedSoftmaxLoss, scale=30.0),
    "CosFaceLoss": CosFaceLoss,
    "ArcFaceLoss": ArcFaceLoss,
}
SGD = partial(torch.optim.SGD, momentum=0.9)


class Data(NamedTuple):
    """Samples (N, D) with labels (N,), others to judge by, and a network for them."""

    name: str
    x: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    network: Callable[[], nn.Module]
    embedding_size: int
    epochs: int


class Setting(NamedTuple):
    """How a head is trained; weight_length: of the class weights at the start, max_norm: of the gradients."""

    name: str
    optimizer: Callable[..., Any]
    lr: float
    weight_length: float | None = None
    max_norm: float | None = None
    batch_norm: bool = False


SETTINGS = (
    *(Setting(f"SGD {lr}", SGD, lr) for lr in (0.5, 0.05, 0.005)),
    *(Setting(f"Adam {lr}", torch.optim.Adam, lr) for lr in (0.01, 0.001)),
    Setting("AdamW 0.001", torch.optim.AdamW, 0.001),
    *(Setting(f"SGD 0.05, weights of length {n}", SGD, 0.05, weight_length=n) for n in (0.1, 10.0)),
    *(Setting(f"SGD {lr}, gradients clipped at 1", SGD, lr, max_norm=1.0) for lr in (0.5, 0.05)),
    *(Setting(f"SGD {lr}, batch norm", SGD, lr, batch_norm=True) for lr in (0.5, 0.05, 0.005)),
)


def digits() -> Data:
    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, labels = images[order].float() / 16, labels[order].long()

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    return Data("digits", x[:1400], labels[:1400], x[1400:], labels[1400:], network, 32, epochs=30)


def features(file: Path) -> Data:
    found = read_features(file)
    if found.split is None:
        raise SystemExit(f"error: {file} has no split to judge by")
    x, train = found.features.float(), found.split == 0
    of_both = x[train], found.labels[train].long(), x[~train], found.labels[~train].long()
    return Data(file.stem, *of_both, partial(nn.Linear, x.shape[1], 128), 128, epochs=10)


def train(data: Data, head: Callable[..., nn.Module], setting: Setting, seed: int = 0) -> tuple[float, float]:
    """Accuracy on held-out samples in percent, and the mean length of their embeddings."""
    torch.manual_seed(seed)
    network = data.network()
    if setting.batch_norm:
        network = nn.Sequential(network, nn.BatchNorm1d(data.embedding_size))
    loss: Any = head(num_classes=int(data.labels.max()) + 1, embedding_size=data.embedding_size)
    if setting.weight_length is not None:
        with torch.no_grad():
            loss.weight.mul_(setting.weight_length / loss.weight.norm(dim=1, keepdim=True))
    parameters = [*network.parameters(), *loss.parameters()]
    optimizer = setting.optimizer(parameter_groups(network, loss, lr=setting.lr))
    for _ in range(data.epochs):
        for batch in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            loss(network(data.x[batch]), data.labels[batch]).backward()
            if setting.max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, setting.max_norm)
            optimizer.step()
    network.eval()
    with torch.no_grad():
        embeddings = network(data.held_out)
        right = loss.predictions(embeddings).argmax(1) == data.held_out_labels
    return 100 * right.float().mean().item(), embeddings.norm(dim=1).mean().item()


def table(data: Data, settings: Iterable[Setting] = SETTINGS) -> str:
    """Markdown: accuracy, and the length of the embeddings."""
    lines = [f"| {data.name} | {' | '.join(HEADS)} |", "|---|" + "---:|" * len(HEADS)]
    for setting in settings:
        found = (train(data, head, setting) for head in HEADS.values())
        lines.append(f"| {setting.name} | {' | '.join(f'{right:.1f} ({size:.2g})' for right, size in found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, nargs="*", default=[])
    for data in (digits(), *map(features, parser.parse_args().features)):
        print(table(data), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
