"""Training through the cache: weights and codebooks for the codec that will serve them."""

from kvjax.train.adapter import Adapter, adapt, adapt_plan, init_adapter
from kvjax.train.distill import Progress, Training, train
from kvjax.train.quantized import quantized_hidden
from kvjax.train.state import load_adapter, train_saving

__all__ = [
    "Adapter",
    "Progress",
    "Training",
    "adapt",
    "adapt_plan",
    "init_adapter",
    "load_adapter",
    "quantized_hidden",
    "train",
    "train_saving",
]
