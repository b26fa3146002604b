"""Configuration that mmdetection stores in its checkpoints, as the text of a Python file."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

# Places of numbers in mmdetection 2 and 3, and the options of `NetworkConfig` that they set.
NUMBERS = {
    "model.test_cfg.rcnn.score_thr": "score_threshold",
    "model.test_cfg.rcnn.nms.iou_threshold": "detection_nms",
    "model.test_cfg.rcnn.max_per_img": "max_detections",
    "model.test_cfg.rpn.nms.iou_threshold": "rpn_nms",
    "model.test_cfg.rpn.nms_pre": "rpn_candidates_test",
    "model.test_cfg.rpn.max_per_img": "proposals_test",
    "model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": "sampling_ratio",
    "model.rpn_head.anchor_generator.ratios": "anchor_ratios",
}


class StoredConfig(NamedTuple):
    """Part of a stored configuration that this program needs."""

    options: dict[str, Any]  # of `NetworkConfig`
    names: list[str]  # of the categories
    bgr: bool | None  # the network takes the colours as blue, green, red; None: unknown


def read_stored_config(meta: Mapping[str, Any]) -> StoredConfig:
    """Read the entry "meta" of a checkpoint of mmdetection; everything in it is optional."""
    info = meta.get("dataset_meta")
    info = {**meta, **(info if isinstance(info, Mapping) else {})}
    lists = [info[key] for key in ("CLASSES", "classes") if isinstance(info.get(key), (list, tuple))]
    text = meta.get("cfg", meta.get("config"))
    config = _evaluate_assignments(text) if isinstance(text, str) else {}
    options: dict[str, Any] = {}
    for place, name in NUMBERS.items():
        if isinstance(value := _get(config, place), (int, float, list)):
            options[name] = value
    generator = _get(config, "model.rpn_head.anchor_generator") or {}
    scales, strides = generator.get("scales"), generator.get("strides")
    if isinstance(scales, list) and isinstance(strides, list) and len(scales) == 1:
        options["anchor_sizes"] = [scales[0] * stride for stride in strides]
    if _get(config, "model.backbone.style") == "caffe":
        options["stride_style"] = "caffe"
    steps = config.get("test_pipeline")
    sizes = [step.get("img_scale", step.get("scale")) for step in steps if isinstance(step, dict)] if steps else []
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size):
            options |= {"min_size": min(size), "max_size": max(size)}
    colours = _get(config, "model.data_preprocessor") or config.get("img_norm_cfg") or {}
    to_rgb = colours.get("bgr_to_rgb", colours.get("to_rgb"))
    order = 1 if to_rgb else -1
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if isinstance(values := colours.get(key), list) and isinstance(to_rgb, bool):
            options[name] = [value / 255 for value in values][::order]
    names = [str(name) for name in lists[0]] if lists else []
    return StoredConfig(options, names, None if to_rgb is None else not to_rgb)


def _get(values: Any, place: str) -> Any:
    for key in place.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _evaluate_assignments(text: str) -> dict[str, Any]:
    """Return the values that a Python text assigns, as far as they are literals; nothing is executed."""
    try:
        lines = ast.parse(text).body
        return {
            line.targets[0].id: _literal(line.value)
            for line in lines
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr | None) -> Any:
    """Evaluate constants, lists, tuples (as lists), dictionaries and calls of `dict`; anything else is None."""
    match node:
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            return [_literal(item) for item in node.elts]
        case ast.Dict():
            return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values)}
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {item.arg: _literal(item.value) for item in node.keywords}
    return None
