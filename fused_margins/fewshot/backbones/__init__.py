"""The networks of the few-shot papers, from images to embeddings; `Backbone` names one and its settings.

network -> convnets, heads, resnets -> drop
"""

from .network import Network

__all__ = ["Network"]
