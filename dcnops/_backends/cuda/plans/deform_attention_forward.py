"""Forward passes of multi-scale deformable attention and deformable aggregation: one kernel."""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.deform_attention_common import (
    AttentionKernels,
    DeformAttentionPoints,
    RowLanes,
    aggregation_points,
    attention_points,
)
from dcnops._explain import LOGGER

_UNIT = "deform_attention_forward"


class DeformAttentionForwardParams(ctypes.Structure):
    """Parameters of the kernel of deform_attention_forward.cu."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("points", DeformAttentionPoints),
        ("lanes", RowLanes),
    ]


def ms_deform_attn(
    engine: Engine,
    geometry: MSDeformAttnGeometry,
    value: Any,
    spatial_shapes: Any | None,
    sampling_locations: Any,
    attention_weights: Any,
) -> Any:
    """Return the output [N, Lq, M*D]. All arrays are contiguous. There is no scratch memory."""
    points = attention_points(engine, geometry, spatial_shapes, sampling_locations, attention_weights)
    return _sample(engine, points, geometry.output_shape, value, sampling_locations)


def deform_aggregate(
    engine: Engine, geometry: DeformAggregateGeometry, input: Any, offset: Any, mask: Any | None
) -> Any:
    """Return the output [N, oh, ow, G*D]. All arrays are contiguous. There is no scratch memory."""
    points = aggregation_points(engine, geometry, offset, mask)
    return _sample(engine, points, geometry.output_shape, input, offset)


def _sample(engine: Engine, points: DeformAttentionPoints, shape: tuple[int, ...], value: Any, locations: Any) -> Any:
    if not value.size:
        return engine.zeros(shape, value.dtype)
    output = engine.empty(shape, value.dtype)
    kernels = AttentionKernels.of(engine, points.D, locations, value)
    lanes, blocks = kernels.rows(points.rows, points.K, kernels.slices)
    if engine.explains:
        LOGGER.debug(
            "%s on %s: %d rows of %d points, %d lanes to a row",
            *(_UNIT, engine.device, points.rows, points.K, 1 << lanes.row_bits),
        )
    params = DeformAttentionForwardParams(engine.pointer(value), engine.pointer(output), points, lanes)
    kernels.launch(_UNIT, "deform_attention_forward", blocks, params, kernels.shared_bytes())
    return output
