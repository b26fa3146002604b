"""Whole experiments: the demo and the ablation."""

from .ablation import TRAIN_IMAGES, VAL_IMAGES, VARIANTS, run_ablation
from .demo import run_demo

__all__ = [
    "TRAIN_IMAGES",
    "VAL_IMAGES",
    "VARIANTS",
    "run_ablation",
    "run_demo",
]
