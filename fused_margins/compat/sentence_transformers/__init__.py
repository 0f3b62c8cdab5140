"""sentence-transformers on fused kernels: change the import, and nothing else.

`losses` has all that theirs has. Those that the kernels can run are subclasses of theirs with the same name and
constructor; `docs/migration.md` says which, and what of a call is left to their code. Everything else of theirs is
passed on as it is.

Source: https://github.com/huggingface/sentence-transformers, version 6.0 or newer.

>>> import torch
>>> from fused_margins.compat.sentence_transformers import losses
>>> loss = losses.MultipleNegativesRankingLoss(model=None, scale=2.0)
>>> loss.compute_loss_from_embeddings([torch.eye(3), torch.eye(3)], None)
tensor(0.2395)
"""

from typing import Any

from ..passing_on import attribute_of, pass_on

try:
    import sentence_transformers as _theirs
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ModuleNotFoundError(
        "fused_margins.compat.sentence_transformers: expected sentence-transformers 6.0 or newer, got none; "
        'install it with: pip install "fused-margins[sentence-transformers]"',
        name=error.name,
    ) from None

if int(_theirs.__version__.split(".")[0]) < 6:
    raise ImportError(
        "fused_margins.compat.sentence_transformers: expected sentence-transformers 6.0 or newer, got "
        f'{_theirs.__version__}; install it with: pip install "fused-margins[sentence-transformers]"'
    )

from . import losses

__all__ = ["losses"]
__version__ = _theirs.__version__

pass_on(__name__, _theirs.__name__, without=("losses",))


def __getattr__(name: str) -> Any:
    """SentenceTransformer, SentenceTransformerTrainer, util, evaluation, ...: theirs."""
    return attribute_of(__name__, _theirs, name)
