"""Training and judging few-shot embeddings with the losses of this library; the command `fused-margins` lives here.

An arrow is the direction in which one reads:

    one training   config, presets -> datasets, augment, backbones -> objectives, optimization -> trainer
                   -> runs
    its judgement  episodes, metrics -> evaluation -> report (plots, reports)
    many           trials -> studies/ (a module a paper, and reproduce) -> suite (a core each)
    the command    commands/ -> cli; beside them plan, embedding, process and terminal
"""
