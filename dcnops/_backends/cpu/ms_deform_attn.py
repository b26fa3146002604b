"""Multi-scale deformable attention on NumPy arrays."""

from __future__ import annotations

import numpy as np

from dcnops._attention_shapes import MSDeformAttnGeometry
from dcnops._backends.cpu.arrays import Array, loop_array, rounded
from dcnops._backends.cpu.compiled import quiet
from dcnops._backends.cpu.deform_attention import HeadStrides, Point, WeightedSamples


@quiet
def ms_deform_attn(
    geometry: MSDeformAttnGeometry,
    value: Array,
    spatial_shapes: None,
    sampling_locations: Array,
    attention_weights: Array,
) -> Array:
    """Compute multi-scale deformable attention. See `dcnops.ms_deform_attn`."""
    samples = _weighted_samples(geometry, value, sampling_locations, attention_weights)
    return rounded(samples.forward(), value.dtype).reshape(geometry.output_shape)


@quiet
def ms_deform_attn_backward(
    geometry: MSDeformAttnGeometry,
    grad_out: Array,
    value: Array,
    spatial_shapes: None,
    sampling_locations: Array,
    attention_weights: Array,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, Array]:
    """Compute the gradients in `needs`, by argument name. See `dcnops.ms_deform_attn_backward`."""
    g = geometry
    samples = _weighted_samples(geometry, value, sampling_locations, attention_weights)
    gradient = loop_array(grad_out, samples.dtype, g.N * g.Lq, g.M, g.D)
    results = {}
    if "value" in needs:
        results["value"] = rounded(samples.backward_value(gradient), value.dtype).reshape(value.shape)
    wanted = {
        name: np.empty(array.shape if name in needs else (0, 0), samples.dtype)
        for name, array in (("sampling_locations", samples.offset), ("attention_weights", samples.weight))
    }
    if needs & wanted.keys():
        samples.backward_sampling(gradient, *wanted.values())
    for name, array in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if name in needs:
            results[name] = rounded(wanted[name], array.dtype).reshape(array.shape)
    return results


def _weighted_samples(
    geometry: MSDeformAttnGeometry, value: Array, sampling_locations: Array, attention_weights: Array
) -> WeightedSamples:
    g = geometry
    assert g.shapes is not None
    points, start = [], 0
    for (height, width), count in zip(g.shapes, g.points):
        points += [Point(height, width, start, scale=(height, width))] * count
        start += height * width
    return WeightedSamples(
        queries=(g.Lq, max(g.Lq, 1)),
        origin=(-0.5, -0.5),
        step=(0, 0),
        points=points,
        strides=HeadStrides(offset=2 * g.K, weight=g.K),
        value=value,
        offset=sampling_locations.reshape(g.N * g.Lq, g.M * g.K * 2),
        weight=attention_weights.reshape(g.N * g.Lq, g.M * g.K),
    )
