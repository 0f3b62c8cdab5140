# %% [markdown]
# # Easy positives on classes of two modes
#
# Labels are often coarser than what they name. Here each class is two digits: 0 and 1, 2 and 3, and so on. A
# network learns these five classes, and then it is asked for the ten digits, of which it was not told. Levi et
# al. (Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020) propose to pull
# each anchor to its nearest sample of the class alone, its easy positive: the modes need not come together
# then.

# %%
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_margins import ClassBalancedBatches, EasyPositiveTripletLoss
from fused_margins.mining import batch_lacks

EPOCHS, SEEDS = 40, 3
torch.set_num_threads(1)
torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16  # (1797, 64)
digits = torch.tensor(data.target)  # (1797,)
pairs = digits // 2  # (1797,) five classes
held_out = torch.arange(len(digits)) % 3 == 0

# %% [markdown]
# ## Batches with positives
#
# A batch of few samples a class can lack positives; `batch_lacks` counts anchors without one. A sampler of
# balanced batches gives each class equally many.

# %%
x, labels = images[~held_out], pairs[~held_out]
sampler = ClassBalancedBatches(labels, 5, 24, generator=torch.Generator().manual_seed(0))
print("balanced:", batch_lacks(labels[next(iter(sampler))]))
print("ten images at random:", batch_lacks(labels[torch.randperm(len(x))[:10]]))

# %% [markdown]
# ## The same training, with either kind of positive


# %%
def train(positives: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    loss_function = EasyPositiveTripletLoss(positives=positives)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = ClassBalancedBatches(labels, 5, 24, generator=torch.Generator().manual_seed(seed))
    for _ in range(EPOCHS):
        for batch in batches:
            loss = loss_function(network(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def recall_at_1(network: nn.Module, of: Tensor) -> float:
    """How often the nearest other held-out image has the same label."""
    embeddings = nn.functional.normalize(network(images[held_out]), dim=1)
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
    return 100 * float((of[held_out][nearest] == of[held_out]).double().mean())


# %% [markdown]
# ## What is left of the digits

# %%
networks = {kind: [train(kind, seed) for seed in range(SEEDS)] for kind in ("all", "easy")}
for kind, trained in networks.items():
    of_digits = [recall_at_1(network, digits) for network in trained]
    of_pairs = [recall_at_1(network, pairs) for network in trained]
    print(f"{kind:>4} positives: Recall@1 of digits", *(f"{value:.1f}" for value in of_digits), end=" ")
    print("of the classes in training", *(f"{value:.1f}" for value in of_pairs))

# %%
# Two maps of the held-out images, trained with all positives and with easy ones, coloured by digit.
figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, (kind, trained) in zip(panels, networks.items()):
    with torch.no_grad():
        embeddings = nn.functional.normalize(trained[0](images[held_out]), dim=1)
    torch.manual_seed(0)
    centred = embeddings - embeddings.mean(0)
    plane = centred @ torch.pca_lowrank(centred, q=2)[2]
    axes.scatter(*plane.T, c=digits[held_out], cmap="Paired", vmin=-0.5, vmax=11.5, s=8)
    axes.set(title=f"{kind} positives", xticks=[], yticks=[])

# %% [markdown]
# The maps show the two directions in which held-out embeddings differ most. A class has the two shades of one
# colour, its digits. Above stands, for each of three seeds, how often the nearest image is of the same digit;
# the two numbers that can be compared are those of the digits, since both networks were trained for the
# classes.
