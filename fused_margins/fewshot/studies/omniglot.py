"""Omniglot by two protocols: the split of Vinyals et al. 2016, and the official one-shot runs (Lake et al. 2015)."""

from collections.abc import Mapping, Sequence

from ..config import Judging, Loss, TrainConfig
from ..evaluation import official_runs_accuracy
from ..reports import Table, figure_text
from ..trials import trials_of
from . import Results, Study

WAYS = (5, 20)
VINYALS_JUDGING = Judging(ways=WAYS, shots=(1, 5))
VINYALS_COLUMNS = {
    f"{n_way}-way {k_shot}-shot{', centroid' if kind else ''}": f"novel_{n_way}way_{k_shot}shot{kind}"
    for kind in ("", "_centroid")
    for n_way in WAYS
    for k_shot in VINYALS_JUDGING.shots
}
OFFICIAL_COLUMNS = {"official runs": "official_runs", "20-way 1-shot, all alphabets": "novel_20way_1shot_centroid"}


def vinyals_study(config: TrainConfig, losses: Mapping[str, Loss], seeds: Sequence[int], episodes: int = 600) -> Study:
    """Trained on 1,028 characters in four rotations, each a class; episodes of 423 others, turned as well."""
    config = config.but(dataset="omniglot")
    judging = VINYALS_JUDGING.but(episodes=episodes)
    return Study(
        "omniglot-vinyals",
        f"Omniglot, split of Vinyals et al., {config.backbone.title}",
        "For comparison: prototypical networks (Snell et al. 2017) reach 98.8% at 5-way 1-shot and 96.0% at 20-way "
        "1-shot with the same four blocks. There are 20 drawings of a character: 5-shot episodes leave 15 to ask for, "
        "not 16.",
        trials_of(config, losses, seeds, judging),
        VINYALS_COLUMNS,
    )


def official_study(config: TrainConfig, losses: Mapping[str, Loss], seeds: Sequence[int], episodes: int = 600) -> Study:
    """Trained on the 30 background alphabets, judged by the 20 official runs of 20-way one-shot within an alphabet."""
    config = config.but(dataset="omniglot-background")
    judging = Judging(episodes=episodes, ways=WAYS, shots=(1,), official_runs=True)

    def raw_pixels(results: Results) -> list[Table]:
        row = [
            "raw pixels, cosine",
            figure_text(
                "official_runs", *official_runs_accuracy(lambda pixels: pixels.flatten(1), config.image_size or 28)
            ),
        ]
        return [Table("Without any training, ± over the 20 runs", ["", "official runs"], [row])]

    return Study(
        "omniglot-official",
        f"Omniglot, official one-shot runs, {config.backbone.title}",
        "For comparison (Lake et al. 2015 and 2019): people 95.5%, Bayesian program learning 96.7%, a convolutional "
        "Siamese network 92.0%, prototypical networks trained on these alphabets 86.3%.",
        trials_of(config, losses, seeds, judging),
        OFFICIAL_COLUMNS,
        more_tables=raw_pixels,
    )
