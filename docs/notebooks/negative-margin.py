# %% [markdown]
# # A negative margin on digits
#
# A network learns five of scikit-learn's digits and is then asked for the five others, of which it gets one
# example each. Liu et al. (Negative margin matters, 2020) report that a margin below 0 makes such novel classes
# easier to tell apart. This is a small example, not their protocol: one hidden layer, images of 8 x 8, a few
# seconds a training.

# %%
import math

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_margins import MarginSoftmaxLoss, parameter_groups

EPOCHS, SEEDS = 15, 5
torch.set_num_threads(1)
data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16  # (1797, 64)
digits = torch.tensor(data.target)  # (1797,)

# %% [markdown]
# ## Training
#
# The loss holds the class weights, so the optimizer gets its parameters as well as those of the network.


# %%
def train(margin: float, base: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    loss_function = MarginSoftmaxLoss(num_classes=len(base), embedding_size=32, scale=10.0, margin=margin)
    optimizer = torch.optim.Adam(parameter_groups(network, loss_function, lr=1e-3))
    chosen = torch.isin(digits, base)
    x, y = images[chosen], torch.searchsorted(base, digits[chosen])
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(64):
            loss = loss_function(network(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


# %% [markdown]
# ## One example of each novel class
#
# In each of 200 episodes one image of each novel digit is drawn, and all others of them go to the nearest by
# cosine.


# %%
@torch.no_grad()
def one_shot(network: nn.Module, novel: Tensor, seed: int, episodes: int = 200) -> float:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.isin(digits, novel)
    embeddings = nn.functional.normalize(network(images[chosen]), dim=1)
    labels = torch.searchsorted(novel, digits[chosen])
    right = 0.0
    for _ in range(episodes):
        order = torch.randperm(len(labels), generator=generator)
        shown = torch.stack([order[(labels[order] == c).nonzero()[0, 0]] for c in range(len(novel))])
        predicted = (embeddings @ embeddings[shown].T).argmax(1)
        asked = torch.ones(len(labels), dtype=torch.bool).index_fill(0, shown, False)
        right += float((predicted == labels)[asked].double().mean())
    return right / episodes


# %% [markdown]
# ## Five seeds
#
# Each seed draws its own base classes; all margins see the same ones, so that their differences can be taken
# seed by seed.

# %%
MARGINS = (-0.6, -0.3, 0.0, 0.3)
accuracy = torch.empty(SEEDS, len(MARGINS), dtype=torch.float64)
for seed in range(SEEDS):
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    base, novel = shuffled[:5].sort().values, shuffled[5:].sort().values
    for column, margin in enumerate(MARGINS):
        accuracy[seed, column] = 100 * one_shot(train(margin, base, seed), novel, seed)

T_95 = 2.776  # Student's t for 95% with 4 degrees of freedom
difference = accuracy - accuracy[:, [MARGINS.index(0.0)]]
interval = T_95 * difference.std(0) / math.sqrt(SEEDS)
for column, margin in enumerate(MARGINS):
    print(
        f"m = {margin:4}: {accuracy[:, column].mean():.1f}%, minus that of m = 0: "
        f"{difference[:, column].mean():+.1f} ± {interval[column]:.1f}"
    )

# %%
# Accuracy on novel classes against the margin: the mean of five seeds over a thin line for each.
figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
axes.plot(MARGINS, accuracy.T, color="#0072B2", linewidth=0.7, alpha=0.4)
axes.plot(MARGINS, accuracy.mean(0), color="#0072B2", marker="o")
axes.set(xlabel="margin", ylabel="novel classes, 1-shot, %", title="mean, and each seed")
axes.grid(alpha=0.3)

# %% [markdown]
# An interval that contains 0 says that five seeds do not tell the two margins apart. On larger data a margin below 0
# did not always help: [Few-shot](../few-shot.html) has what was measured.
