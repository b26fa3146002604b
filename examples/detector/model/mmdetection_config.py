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
    names = [str(name) for name in lists[0]] if lists else []
    text = meta.get("cfg", meta.get("config"))
    config = _evaluate_assignments(text) if isinstance(text, str) else {}
    options = {name: value for place, name in NUMBERS.items() if _is_number(value := _get(config, place))}
    ratios, scales, strides = (
        _numbers(_get(config, f"model.rpn_head.anchor_generator.{name}")) for name in ("ratios", "scales", "strides")
    )
    if ratios:
        options["anchor_ratios"] = ratios
    if len(scales) == 1 and strides:
        options["anchor_sizes"] = [scales[0] * stride for stride in strides]
    if _get(config, "model.backbone.style") == "caffe":
        options["stride_style"] = "caffe"
    steps = config.get("test_pipeline")
    for step in steps if isinstance(steps, list) else []:
        size = _numbers(_get(step, "img_scale") or _get(step, "scale"))
        if len(size) == 2:
            options |= {"min_size": min(size), "max_size": max(size)}
    colours = _get(config, "model.data_preprocessor") or config.get("img_norm_cfg")
    mean, deviation = _numbers(_get(colours, "mean")), _numbers(_get(colours, "std"))
    to_rgb = next((value for key in ("bgr_to_rgb", "to_rgb") if isinstance(value := _get(colours, key), bool)), None)
    if to_rgb is not None and mean and deviation:
        order = 1 if to_rgb else -1
        options["image_mean"] = [value / 255 for value in mean][::order]
        options["image_std"] = [value / 255 for value in deviation][::order]
    return StoredConfig(options, names, None if to_rgb is None else not to_rgb)


def _get(values: Any, place: str) -> Any:
    """Return the value at a place in nested dictionaries, None if there is none."""
    for key in place.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: object) -> list[Any]:
    """Return a list of numbers; an empty one for anything else."""
    return value if isinstance(value, list) and all(map(_is_number, value)) else []


def _evaluate_assignments(text: str) -> dict[str, Any]:
    """Return the values that a Python text assigns, as far as they are literals; nothing is executed."""
    try:
        return {
            line.targets[0].id: _literal(line.value)
            for line in ast.parse(text).body
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr) -> Any:
    """Evaluate constants, lists, tuples (as lists), dictionaries and calls of `dict`; anything else is None."""
    match node:
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            return [_literal(item) for item in node.elts]
        case ast.Dict():
            items = zip(node.keys, node.values)
            return {key.value: _literal(value) for key, value in items if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {item.arg: _literal(item.value) for item in node.keywords}
    return None
