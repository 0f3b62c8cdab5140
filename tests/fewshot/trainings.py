"""What tests of trainings share: losses by name, and ways to stop one."""

import torch

from fused_margins.fewshot.config import make_loss

MAGNET = make_loss("magnet", warm_epochs=1, clusters_per_class=2, num_clusters=3, samples_per_cluster=4)


def loss_named(name):
    """Of this name; "triplet with memory" searches the last 40 embeddings, too."""
    if name == "magnet":
        return MAGNET
    name, *memory = name.split(" with ")
    return make_loss(name, memory=40) if memory else make_loss(name)


class StopAfter:
    """Asks to stop when it has been asked `steps` times."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self):
        self.steps -= 1
        return self.steps < 0


def assert_same_bits(first, second):
    """Of all that two trainings have determined."""
    assert first.history == second.history
    tensors, others = ({**t.model.state_dict(), **dict(t.objective.named_parameters())} for t in (first, second))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
