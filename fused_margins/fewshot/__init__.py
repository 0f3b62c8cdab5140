"""Training and judging few-shot embeddings with the losses of this library; the command `fused-margins` lives here.

config -> datasets, augment, backbones, samplers -> objectives, optimization -> trainer -> metrics, episodes, evaluation
-> report -> commands -> cli; beside them parity, doctor and demo.
"""
