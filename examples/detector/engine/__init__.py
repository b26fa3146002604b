"""Training and evaluation, in one process or several."""

from ..errors import Interrupted
from .distributed import choose_device, from_main, gather_lists, is_main, rank, session, world_size
from .evaluation import (
    SUMMARY,
    Kind,
    Metrics,
    Scores,
    coco_metrics,
    detect,
    evaluated_kinds,
    load_results,
    metrics_table,
    write_detections,
    write_results,
)
from .trainer import Trainer, build_trainer
from .training import BEST, CHECKPOINT, MODEL, RESUME_HINT, build_and_train, train

__all__ = [
    "BEST",
    "CHECKPOINT",
    "MODEL",
    "RESUME_HINT",
    "SUMMARY",
    "Interrupted",
    "Kind",
    "Metrics",
    "Scores",
    "Trainer",
    "build_and_train",
    "build_trainer",
    "choose_device",
    "coco_metrics",
    "detect",
    "evaluated_kinds",
    "from_main",
    "gather_lists",
    "is_main",
    "load_results",
    "metrics_table",
    "rank",
    "session",
    "train",
    "world_size",
    "write_detections",
    "write_results",
]
