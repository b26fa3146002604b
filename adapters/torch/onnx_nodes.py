"""Helpers of the translations to ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnops._errors import ArgumentError, ShapeError

LOWEST_OPSET = 19


def opset() -> Any:
    """Return the ONNX operators. Imported here because only an export needs onnxscript."""
    import onnxscript

    return onnxscript.opset19


def check_opset() -> None:
    """Check the opset of a direct export, which would silently write operators of a newer opset into the model."""
    from onnxscript import evaluator

    requested = getattr(evaluator.default(), "opset", None)
    if requested is not None and requested.version < LOWEST_OPSET:
        raise opset_error(requested.version)


def opset_error(version: int) -> ArgumentError:
    return ArgumentError(f"opset_version must be at least {LOWEST_OPSET}, the first with DeformConv, got {version}")


def data_types() -> Any:
    import onnx_ir

    return onnx_ir.DataType


def cast(value: Any, dtype: Any) -> Any:
    return value if value is None or value.dtype == dtype else opset().Cast(value, to=int(dtype))


def fixed_size(name: str, size: Any) -> int:
    if not isinstance(size, int):
        raise ShapeError(f"{name} must have a fixed size in an ONNX model, got the dynamic size {size}")
    return size


def constant_of(values: Any, dtype: Any) -> Any:
    import onnx_ir

    return opset().Constant(value=onnx_ir.tensor(np.asarray(values, dtype.numpy())))


def to_index(value: Any) -> Any:
    return opset().Cast(value, to=int(data_types().INT64))
