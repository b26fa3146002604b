"""Data: COCO files, the synthetic data set, images and batches."""

from .annotation_import import import_annotations
from .augmentation import Augmentation
from .batches import AspectRatioBatches, AugmentedImages, Batch, load_batches, prepare_worker, worker_errors
from .categories import default_categories, match_categories, named_categories, read_categories
from .coco import CocoDataset, Sample, Split, check_categories, find_data, has_split, load_train_and_val
from .coco_json import Category
from .images import as_image, find_images, pad_elongated, read_image, to_picture
from .segmentations import encode_segmentation
from .synthetic import write_synthetic
from .torch_datasets import TorchDataset
from .voc import read_voc
from .yolo import read_yolo

__all__ = [
    "AspectRatioBatches",
    "Augmentation",
    "AugmentedImages",
    "Batch",
    "Category",
    "CocoDataset",
    "Sample",
    "Split",
    "TorchDataset",
    "as_image",
    "check_categories",
    "default_categories",
    "encode_segmentation",
    "find_data",
    "find_images",
    "has_split",
    "import_annotations",
    "load_batches",
    "load_train_and_val",
    "match_categories",
    "named_categories",
    "pad_elongated",
    "prepare_worker",
    "read_categories",
    "read_image",
    "read_voc",
    "read_yolo",
    "to_picture",
    "worker_errors",
    "write_synthetic",
]
