"""Deformable aggregation on NumPy arrays."""

from __future__ import annotations

import numpy as np

from dcnops._attention_shapes import DeformAggregateGeometry
from dcnops._backends.cpu.arrays import Array, loop_array, rounded
from dcnops._backends.cpu.compiled import quiet
from dcnops._backends.cpu.deform_attention import HeadStrides, Point, WeightedSamples


@quiet
def deform_aggregate(geometry: DeformAggregateGeometry, input: Array, offset: Array, mask: Array | None) -> Array:
    """Compute deformable aggregation. See `dcnops.deform_aggregate`."""
    samples = _weighted_samples(geometry, input, offset, mask)
    return rounded(samples.forward(), input.dtype).reshape(geometry.output_shape)


@quiet
def deform_aggregate_backward(
    geometry: DeformAggregateGeometry,
    grad_out: Array,
    input: Array,
    offset: Array,
    mask: Array | None,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, Array]:
    """Compute the gradients in `needs`, by argument name. See `dcnops.deform_aggregate_backward`."""
    g = geometry
    samples = _weighted_samples(geometry, input, offset, mask)
    gradient = loop_array(grad_out, samples.dtype, g.N * g.oh * g.ow, g.G, g.D)
    results = {}
    if "input" in needs:
        results["input"] = rounded(samples.backward_value(gradient), input.dtype).reshape(input.shape)
    if needs & {"offset", "mask"}:
        nothing = np.empty((0, 0), samples.dtype)
        # The padding of a packed gradient is not written.
        grad_offset = np.zeros(samples.offset.shape, samples.dtype) if "offset" in needs else nothing
        grad_mask = np.empty(samples.weight.shape, samples.dtype) if "mask" in needs else nothing
        samples.backward_sampling(gradient, grad_offset, grad_offset if g.is_packed else grad_mask)
        if "offset" in needs:
            results["offset"] = rounded(grad_offset, offset.dtype).reshape(offset.shape)
        if "mask" in needs and mask is not None:
            results["mask"] = rounded(grad_mask, mask.dtype).reshape(mask.shape)
    return results


def _weighted_samples(
    geometry: DeformAggregateGeometry, input: Array, offset: Array, mask: Array | None
) -> WeightedSamples:
    g = geometry
    cy, cx = g.center
    scale = (g.offset_scale, g.offset_scale)
    rows = g.N * g.oh * g.ow
    packed = HeadStrides(offset=3 * g.K, weight=3 * g.K, first_weight=2 * g.K)
    offsets = offset.reshape(rows, offset.shape[3])
    return WeightedSamples(
        queries=(g.oh * g.ow, g.ow),
        origin=(cy - g.ph, cx - g.pw),
        step=(g.sh, g.sw),
        points=[Point(g.H, g.W, 0, scale, (i * g.dh - cy, j * g.dw - cx)) for i, j in g.taps],
        strides=packed if mask is None else HeadStrides(offset=2 * g.K, weight=g.K),
        value=input.reshape(g.N, g.H * g.W, g.G, g.D),
        offset=offsets,
        weight=offsets if mask is None else mask.reshape(rows, g.G * g.K),
    )
