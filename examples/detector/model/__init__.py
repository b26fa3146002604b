"""Detectors: networks, weights, checkpoints, R-CNN feature mimicking and costs."""

from .checkpoint import load_checkpoint, load_detector, restore_model, save_checkpoint
from .flops import Count, cost_rows, cost_table, count
from .mimicking import MimickingDetector
from .network import build_detector
from .weights import load_backbone

__all__ = [
    "Count",
    "MimickingDetector",
    "build_detector",
    "cost_rows",
    "cost_table",
    "count",
    "load_backbone",
    "load_checkpoint",
    "load_detector",
    "restore_model",
    "save_checkpoint",
]
