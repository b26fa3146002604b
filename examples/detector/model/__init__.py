"""Detectors: networks, weights, checkpoints, R-CNN feature mimicking and costs."""

from .checkpoint import config_of, load_checkpoint, load_detector, restore_model, save_checkpoint
from .flops import Count, cost_rows, cost_table, count
from .initial_weights import load_initial_detector, read_initial_detector, starting_config
from .mimicking import MimickingDetector
from .network import build_detector
from .onnx_export import export_onnx
from .state_files import tensor_problem
from .weights import load_backbone

__all__ = [
    "Count",
    "MimickingDetector",
    "build_detector",
    "config_of",
    "cost_rows",
    "cost_table",
    "count",
    "export_onnx",
    "load_backbone",
    "load_checkpoint",
    "load_detector",
    "load_initial_detector",
    "read_initial_detector",
    "restore_model",
    "save_checkpoint",
    "starting_config",
    "tensor_problem",
]
