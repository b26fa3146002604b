"""Data: COCO files, the synthetic data set, images, batches and JSON files."""

from .augmentation import Augmentation
from .batches import AspectRatioBatches, AugmentedImages, Batch, load_batches, prepare_worker, worker_errors
from .coco import (
    Category,
    CocoDataset,
    Sample,
    check_categories,
    encode_segmentation,
    find_data,
    is_finite,
    load_train_and_val,
)
from .images import find_images, pad_elongated, read_image, to_picture
from .json_files import read_json, replace_text, write_json
from .synthetic import write_synthetic

__all__ = [
    "AspectRatioBatches",
    "Augmentation",
    "AugmentedImages",
    "Batch",
    "Category",
    "CocoDataset",
    "Sample",
    "check_categories",
    "encode_segmentation",
    "find_data",
    "find_images",
    "is_finite",
    "load_batches",
    "load_train_and_val",
    "pad_elongated",
    "prepare_worker",
    "read_image",
    "read_json",
    "replace_text",
    "to_picture",
    "worker_errors",
    "write_json",
    "write_synthetic",
]
