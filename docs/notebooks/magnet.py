# %% [markdown]
# # Magnet loss, the whole loop
#
# The magnet loss (Rippel et al., Metric learning with adaptive density discrimination, 2015) needs more than a
# batch: an index of clusters over the whole training set says which samples belong together, and clusters age
# as the network moves. The loop is: cluster, draw batches around clusters with a high loss, tell the index the
# losses, cluster again.

# %%
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_margins import MagnetIndex, MagnetLoss

EPOCHS, BATCHES = 12, 25
torch.set_num_threads(1)
torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16  # (1797, 64)
digits = torch.tensor(data.target)  # (1797,)
odd = digits % 2  # (1797,) two classes of five modes each
held_out = torch.arange(len(digits)) % 3 == 0
x, labels = images[~held_out], odd[~held_out]

# %%
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
loss_function = MagnetLoss(alpha=1.0, reduction="none")  # of each sample, as the index wants them
index = MagnetIndex(clusters_per_class=5, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def embed(images: Tensor) -> Tensor:
    return network(images)


def error() -> float:
    """Percent of held-out images that the 8 nearest clusters take for the other class."""
    return 100 * float((index.knc_predict(embed(images[held_out]), 8) != odd[held_out]).double().mean())


# %% [markdown]
# ## The loop
#
# `fit` forgets the losses: it comes once an epoch here. `sample_batch` draws a seed cluster in proportion to
# its mean loss and adds the nearest clusters of the other class; `update_losses` keeps the means.

# %%
losses, errors = [], []
for _ in range(EPOCHS):
    index.fit(embed(x), labels)
    errors.append(error())
    for _ in range(BATCHES):
        batch = index.sample_batch(num_clusters=6, samples_per_cluster=8)
        each = loss_function(network(x[batch.indices]), batch.clusters, batch.cluster_labels)
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        index.update_losses(batch, each)
        losses.append(float(each.detach().mean()))
index.fit(embed(x), labels)
errors.append(error())
print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
print(f"kNC error: {errors[0]:.1f}% at first, {errors[-1]:.1f}% at last")

# %%
# Left the loss of each step, right the kNC error on held-out images after each epoch.
figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(range(1, 1 + len(losses)), losses, color="#0072B2")
left.set(xlabel="step", ylabel="loss, mean of the batch")
right.plot(range(len(errors)), errors, color="#D55E00", marker="o")
right.set(xlabel="epochs", ylabel="kNC error, held-out, %")
left.grid(alpha=0.3)
right.grid(alpha=0.3)

# %% [markdown]
# ## Clusters are digits, more or less
#
# Nobody told the network of digits. Which digit the samples of each cluster mostly are, and how many of them:

# %%
for cluster in range(len(index.centroids)):
    counts = torch.bincount(digits[~held_out][index.assignments == cluster], minlength=10)
    name = ("even", "odd")[int(index.centroid_labels[cluster])]
    print(f"{name:>4}, cluster {cluster}: digit {int(counts.argmax())}, {int(counts.max())} of {int(counts.sum())}")
