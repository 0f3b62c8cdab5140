"""Training and judging few-shot embeddings with the losses of this library; the command `fused-margins` lives here.

An arrow is the direction in which one reads:

    one training   config, presets -> datasets, augment, backbones -> objectives, optimization -> trainer
                   -> runs
    its judgement  episodes, metrics -> evaluation -> report (plots, reports)
    many           trials -> study -> studies/ (a file a paper, and reproduce) -> suite (jobs: a core each; process)
    the command    options -> commands/ -> cli; beside them backends, plan, compare and embedding
"""
