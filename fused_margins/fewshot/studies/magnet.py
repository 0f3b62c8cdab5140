"""The magnet loss beside softmax and triplet, after equally many images: kNC error, and the hierarchy that it recovers.

Source: Rippel et al., Metric learning with adaptive density discrimination, 2015.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..config import Judging, Loss, Magnet, Softmax, TrainConfig, Triplet
from ..plots import knc_curves
from ..study import Claim, Results, Study
from ..tables import Table
from ..trials import Trial

SOURCE = "Rippel et al. 2015"
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128)
COLUMNS = {"Recall@1": "recall@1", "MAP@R": "map@r", "NMI": "nmi", "modes": "modes", "kNC error": "knc_error@8"}


def magnet_study(
    config: TrainConfig, seeds: Sequence[int], judging: Judging, magnet: Magnet = Magnet(), name: str = "magnet"
) -> Study:
    """Magnet, softmax and triplet from the same settings; an epoch shows each of them as many images as there are."""
    methods: dict[str, Loss] = {
        "magnet": magnet,
        "softmax": Softmax(scale=magnet.scale),
        "triplet": Triplet(positives="random"),
    }
    judging = judging.model_copy(update={"neighbours": NEIGHBOURS})
    trials = [
        Trial(method, config.model_copy(update={"loss": loss, "seed": seed, "labels": "coarse"}), judging)
        for seed in seeds
        for method, loss in methods.items()
    ]

    def knc_table(results: Results) -> list[Table]:
        columns = {f"L = {l}": f"knc_error@{l}" for l in NEIGHBOURS}
        return [results.table("kNC error against the number of nearest clusters L", columns)]

    def figures(results: Results) -> dict[str, Figure]:
        errors = {g: [list(results.values(g, f"knc_error@{l}").values()) for l in NEIGHBOURS] for g in results.groups}
        return {"knc": knc_curves(NEIGHBOURS, errors)}

    return Study(
        name,
        f"Magnet on {config.dataset}, {config.backbone.name}",
        f"Trained for {config.epochs} epochs on coarse labels: the kNC error is of these, all else is judged on the fine "
        "labels, which no training saw.",
        trials,
        COLUMNS,
        baseline="softmax",
        claims=[
            Claim(SOURCE, "magnet recovers the hierarchy below its labels better than softmax (Recall@1)", "magnet", "softmax", "recall@1"),
            Claim(SOURCE, "magnet recovers the hierarchy below its labels better than triplet (Recall@1)", "magnet", "triplet", "recall@1"),
            Claim(SOURCE, "magnet classifies better than softmax with kNC", "softmax", "magnet", "knc_error@8"),
            Claim(SOURCE, "magnet classifies better than triplet with kNC", "triplet", "magnet", "knc_error@8"),
            Claim(SOURCE, "state of the art on Stanford Dogs, Oxford Flowers and Pets", reason="needs their images and ImageNet weights"),
        ],
        more_tables=knc_table,
        figures=figures,
    )
