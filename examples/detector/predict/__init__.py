"""Inference with trained detectors: detections, pictures of them, and their spatial support."""

from .batching import infer_in_batches
from .drawing import contact_sheet, draw_detections
from .inference import AMP_TYPES, RLE, Detections, coco_results, decode_rle, encode_rle, evaluating, infer
from .prediction import Prediction, predict, write_predictions
from .spatial_support import draw_checkpoints, draw_spatial_support

__all__ = [
    "AMP_TYPES",
    "RLE",
    "Detections",
    "Prediction",
    "coco_results",
    "contact_sheet",
    "decode_rle",
    "draw_checkpoints",
    "draw_detections",
    "draw_spatial_support",
    "encode_rle",
    "evaluating",
    "infer",
    "infer_in_batches",
    "predict",
    "write_predictions",
]
