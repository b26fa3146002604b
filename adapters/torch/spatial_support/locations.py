"""Sampling points and bins of a network in the image, and their effect on a node (figures 1 and 2 of the paper)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .graph import NODE, CallGraph, Inputs
from .grids import LOST, Grid
from .nodes import (
    LayerNode,
    Node,
    NodeFunction,
    as_image,
    as_node,
    check_count,
    layer_map,
    magnitude,
    node_grid,
    respond,
)
from .recording import ConvCall, PoolCall, Recorder, inspection

MERGE_DISTANCE = 1e-3  # pixels of the image: nearer points are merged
COARSER = 1.4  # minimum ratio of scales for a coarser map; sizes that do not divide cause small differences


class SamplingPoints(NamedTuple):
    """Points in an image.

    Attributes
    ----------
    positions : Tensor [n, 2], float64
        (y, x) in pixels of the image; the centre of its first pixel is (0, 0). Some may be outside the image.
    strength : Tensor [n], float64
        In descending order.
    layers : list of str
        Names of the layers that sample the points.
    layer : Tensor [n], int64
        Index into `layers` for each point.
    """

    positions: Tensor
    strength: Tensor
    layers: list[str]
    layer: Tensor


class Bins(NamedTuple):
    """Bins of a region.

    Attributes
    ----------
    boxes : Tensor [P, Q, 4], float64
        x1, y1, x2, y2 in pixels of the image. As in the boxes of RoI pooling, the corner of the image is 0.
    strength : Tensor [P, Q], float64
    mask : Tensor [P, Q], float64, or None
        Modulation of each bin; None for v1 and RoIAlign.
    layer : str
    """

    boxes: Tensor
    strength: Tensor
    mask: Tensor | None
    layer: str


def sampling_locations(
    model: nn.Module,
    image: Tensor,
    node: Node,
    *,
    depth: int | None = 3,
    layers: Sequence[str] | None = None,
    max_points: int | None = None,
) -> SamplingPoints:
    """Find the points of the image that a pixel of a map samples through a stack of convolutions.

    The last convolution of the stack samples its input at kh*kw points for each deformable group. A point lies between
    pixels, each of which was in turn sampled by the convolution below. Three 3x3 layers have 9*9*9 points; those of
    regular convolutions form a grid. The masks of v2 reduce the strength of points.

    Parameters
    ----------
    model : torch.nn.Module
        Model with layers of this library, of ``torchvision.ops``, or regular convolutions. For a torchvision detector,
        only the backbone runs.
    image : Tensor [C, H, W] or [1, C, H, W]
        Normalised input of the network.
    node : LayerNode or (layer, y, x)
    depth : int or None
        Maximum number of consecutive convolutions in the stack. It consists of the last ones before the node with a
        kernel larger than 1x1, without those that compute offsets, and contains all parallel branches. A skip
        connection around a convolution is ignored in favour of the convolution, unless that runs at a coarser
        resolution than the node, as in a feature pyramid. None selects all convolutions before the node, including the
        coarser ones.
    layers : sequence of str, optional
        Names of the layers of the stack, in any order, instead of `depth`.
    max_points : int, optional
        Return only this many of the strongest points.

    Returns
    -------
    SamplingPoints
        Points of the layers at the far ends of the stack, usually one layer. Points of a layer at the same position are
        merged. The strength of a path from the node to a point is the product of its masks and of the bilinear weights
        between its layers; the strength of a point is the sum over its paths.

    Raises
    ------
    ArgumentError
        The node does not exist or cannot be located in the image, there is no such convolution before it, a convolution
        of the stack runs on a map that cannot be located, or an argument is invalid.
    ShapeError
        `image` is not a single image.

    Notes
    -----
    The model is run in evaluation mode; its modes and gradients are restored, and its own exceptions are passed on.
    Grids are followed through strides, padding, pooling and interpolation. Points without a finite position are left
    out.

    Examples
    --------
    Two regular 3x3 convolutions sample 5x5 pixels, and there are 9 paths to the middle one:

    >>> import torch
    >>> from dcnops.adapters.torch.spatial_support import sampling_locations
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    >>> points = sampling_locations(network, torch.rand(1, 20, 20), ("1", 10, 10), depth=2)
    >>> len(points.positions), points.positions[0].tolist(), points.strength[0].item()
    (25, [10.0, 10.0], 9.0)
    """
    _check_counts(depth, max_points)
    node = as_node(node)
    if not isinstance(node, LayerNode):
        raise ArgumentError(f"node must be (layer, y, x): regions have effective_bin_locations, got {node!r}")
    with inspection(model):
        response = _record_response(model, as_image(image), node)
        root = node_grid(response.root, node.layer)
        stack = _select_stack(response, depth, layers)
        samples = _trace_stack(stack, root, node)
    by_name: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for number in sorted(samples, reverse=True):
        by_name[stack.calls[number].name] += samples[number]
    return _collect([(name, *_merge(*map(torch.cat, zip(*parts)))) for name, parts in by_name.items()], max_points)


def effective_sampling_locations(
    model: nn.Module,
    image: Tensor,
    node: Node,
    *,
    depth: int | None = 3,
    layers: Sequence[str] | None = None,
    max_points: int | None = None,
) -> SamplingPoints:
    """Find the sampling points of all layers of a stack and the effect of each on the node's response.

    Parameters
    ----------
    model, image : as in `sampling_locations`
    node : LayerNode, RoINode, their plain tuples, or a function (model, images) -> response
    depth, layers, max_points : as in `sampling_locations`

    Returns
    -------
    SamplingPoints
        One point for each layer, deformable group, tap and output pixel that the response depends on. Its strength is
        the norm of the gradient of the response's norm with respect to its (y, x), per pixel of the image.

    Raises
    ------
    ArgumentError, ShapeError
        See `sampling_locations`.

    Notes
    -----
    Regular convolutions run as deformable ones with offsets of zero, so that networks can be compared. Bilinear
    interpolation has a kink at integer positions; its derivative there is the right-hand one, as in the gradient of the
    operation. The gradient is complete: it includes the branches that compute the offsets of the layers above.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support import effective_sampling_locations
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), ModulatedDeformConv2dPack(4, 8, 3))
    >>> points = effective_sampling_locations(network, torch.rand(1, 20, 20), ("1", 5, 5))
    >>> points.layers, points.layer.bincount().tolist()  # each of the 9 points is a pixel of the layer below
    (['1', '0'], [9, 81])
    """
    _check_counts(depth, max_points)
    node = as_node(node)
    with inspection(model):
        response = _record_response(model, as_image(image), node)
        calls = list(_select_stack(response, depth, layers).calls.values())
        gradients = response.gradients(calls)
    points = []
    for call, gradient in zip(calls, gradients):
        grid = _known_grid(call, call.input_grid)
        scale = torch.tensor(grid.scale, dtype=torch.float64, device=gradient.device)
        per_pixel = gradient.double().reshape(-1, 2, *gradient.shape[2:]) / scale[:, None, None]
        strength = torch.linalg.vector_norm(per_pixel, dim=1).flatten()
        position = grid.to_image(call.positions()[0].flatten(0, 1)).flatten(0, 2)
        kept = (strength > 0) & position.isfinite().all(1)
        points.append((call.name, position[kept], strength[kept]))
    return _collect(points, max_points)


def effective_bin_locations(model: nn.Module, image: Tensor, node: Node) -> Bins:
    """Find the bins of a region's pooling and the effect of each on the node's response.

    Parameters
    ----------
    model, image : as in `sampling_locations`
    node : RoINode, its plain tuple, or a function (model, images) -> response
        If several regions or levels are pooled, the last pooling that the response depends on counts.

    Returns
    -------
    Bins
        The strength is the norm of the gradient of the response's norm with respect to the bin's (y, x), per pixel of
        the image. RoIAlign counts as deformable with offsets of zero. torchvision's RoIAlign is not aligned by default;
        its bins are then half a pixel of the map further right and down.

    Raises
    ------
    ArgumentError
        The response does not depend on a pooled region, or the pooled map cannot be located in the image.
    ShapeError
        `image` is not a single image.

    Examples
    --------
    >>> import torch, torchvision
    >>> from dcnops.adapters.torch import DeformRoIPool, MultiScaleDeformRoIPool
    >>> from dcnops.adapters.torch.spatial_support import effective_bin_locations
    >>> detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
    ...     weights=None, weights_backbone=None, num_classes=5)
    >>> detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], DeformRoIPool(7))
    >>> bins = effective_bin_locations(detector, torch.rand(3, 64, 96), ((10, 10, 66, 52), 3))
    >>> bins.boxes[0, 0], bins.strength.shape
    (tensor([10., 10., 18., 16.], dtype=torch.float64), torch.Size([7, 7]))
    """
    node = as_node(node)
    with inspection(model):
        response = _record_response(model, as_image(image), node)
        if not response.poolings:
            raise ArgumentError("node must depend on a deformable RoI pooling or RoIAlign, there is none before it")
        call = response.poolings[-1]
        gradient = response.gradients([call])[0].double()
    # Usually there is one region. Otherwise, choose the one that the response depends on most.
    region = int(gradient.abs().sum((1, 2, 3)).argmax())
    scale = gradient.new_tensor(_known_grid(call, call.input_grid).scale[::-1])
    # The shift of the grid does not matter: RoI pooling treats the map's pixels as tiles of the image.
    boxes = call.boxes()[region] * scale.repeat(2)
    extent = (call.rois[region, 3:] - call.rois[region, 1:3]).double() * scale
    per_pixel = torch.where(extent == 0, 0.0, gradient[region].movedim(0, -1) / extent)
    mask = None if call.mask is None else call.mask[region].double()
    return Bins(boxes, torch.linalg.vector_norm(per_pixel, dim=-1), mask, call.name)


def _check_counts(depth: int | None, max_points: int | None) -> None:
    for name, value in (("depth", depth), ("max_points", max_points)):
        if value is not None:
            check_count(name, value)


class _Response(NamedTuple):
    """Norm of a node's response, the grid of the node's map if known, and the calls that it depends on."""

    value: Tensor
    root: Grid | None
    graph: CallGraph

    @property
    def poolings(self) -> list[PoolCall]:
        return [call for call in self.graph.calls.values() if isinstance(call, PoolCall)]

    def gradients(self, calls: Sequence[ConvCall | PoolCall]) -> tuple[Tensor, ...]:
        """Return the gradients with respect to the offsets of `calls`."""
        return torch.autograd.grad(self.value, [call.delta for call in calls if call.delta is not None])


def _record_response(model: nn.Module, image: Tensor, node: NodeFunction) -> _Response:
    with Recorder(model, image, probe=True) as recorder:
        if isinstance(node, LayerNode):
            feature_map = layer_map(model, image, node.layer)
            graph = CallGraph(value := magnitude(node.of(feature_map)), recorder.calls)
            return _Response(value, recorder.grids[feature_map], graph)
        graph = CallGraph(value := magnitude(respond(node, model, image)), recorder.calls)
    response = _Response(value, None, graph)
    return response._replace(root=response.poolings[-1].input_grid) if response.poolings else response


class _Stack(NamedTuple):
    """Convolutions of a stack."""

    calls: dict[int, ConvCall]  # by number, the last one first
    inputs: Inputs
    depth: int  # maximum number of consecutive convolutions


def _select_stack(response: _Response, depth: int | None, layers: Sequence[str] | None) -> _Stack:
    calls = {number: call for number, call in response.graph.calls.items() if isinstance(call, ConvCall)}
    if not calls:
        raise ArgumentError(
            "node must depend on a convolution with a kernel larger than 1x1, there is none before it "
            "(or none that gradients reach, as under torch.no_grad())"
        )
    detours: set[int] = set()
    if layers is not None:
        names = list(dict.fromkeys(call.name for call in calls.values()))
        layers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else []
        if not layers or not all(name in names for name in layers):
            raise ArgumentError(f"layers must be a sequence of names among {names}, got {layers!r}")
        chosen = {number for number, call in calls.items() if call.name in layers}
    else:
        # Convolutions on pooled regions have no location. A lost map stays in the stack and causes an error.
        chosen = {number for number, call in calls.items() if call.from_image} or set(calls)
        if depth is not None:
            detours = {number for number in chosen if _is_coarser(calls[number].output_grid, response.root)}
    steps = len(calls) if depth is None or layers is not None else depth
    inputs = response.graph.inputs(chosen, detours)
    reached: set[int] = set()
    front = {NODE}
    for _ in range(steps):
        front = {number for above in front for number in inputs[above]}
        reached |= front
    for number in reached:
        _known_grid(calls[number], calls[number].input_grid)
        if (batch := len(calls[number].offset)) != 1:
            raise ArgumentError(f"model must run {calls[number].name!r} on one image at a time, it ran on {batch}")
    return _Stack({number: calls[number] for number in sorted(reached, reverse=True)}, inputs, steps)


def _is_coarser(grid: Grid | None, root: Grid | None) -> bool:
    return grid is not None and root is not None and max(a / b for a, b in zip(grid.scale, root.scale)) > COARSER


def _trace_stack(stack: _Stack, root: Grid, node: LayerNode) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Return the samples at the far ends of the stack: positions in the image and strengths, by number of the call.

    Each step goes from points in the input of a call to pixels in the results of the calls that feed it, and on to the
    points that those sample.
    """
    device = next(iter(stack.calls.values())).offset.device
    points = torch.tensor([[node.y, node.x]], dtype=torch.float64, device=device)
    front = {NODE: (root, points, points.new_ones(1))}
    found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for step in range(stack.depth):
        weights: dict[int, Tensor] = {}
        for above, (grid, points, strength) in front.items():
            for number in stack.inputs[above]:
                call = stack.calls[number]
                positions = grid.convert(points, _known_grid(call, call.output_grid))
                added = _bilinear_weights(positions, strength, call.offset.shape[2:])
                weights[number] = weights[number] + added if number in weights else added
        front = {}
        for number, weight in weights.items():
            call = stack.calls[number]
            points, strength = _sampled_points(call, weight)
            grid = _known_grid(call, call.input_grid)
            if step + 1 < stack.depth and stack.inputs[number]:
                front[number] = grid, points, strength
            else:
                found[number].append((grid.to_image(points), strength))
    return found


def _sampled_points(call: ConvCall, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points that the weighted pixels [H, W] of a call's result sample, with their strengths."""
    rows, columns = torch.nonzero(weights, as_tuple=True)
    points = call.positions()[0][:, :, rows, columns]
    strength = weights[rows, columns].expand(points.shape[:-1])
    if call.mask is not None:
        strength = strength * call.mask[0].double().unflatten(0, points.shape[:2])[:, :, rows, columns]
    finite = points.isfinite().all(-1)
    return points[finite], strength[finite]


def _bilinear_weights(positions: Tensor, strength: Tensor, size: Sequence[int]) -> Tensor:
    """Return the total bilinear weight of each pixel of a map [H, W] at positions [n, 2] with strengths [n]."""
    height, width = size
    weights = positions.new_zeros(height * width)
    corner = positions.floor()
    for dy in (0, 1):
        for dx in (0, 1):
            pixel = corner + corner.new_tensor([dy, dx])
            weight = (1 - (positions - pixel).abs()).prod(1) * strength
            inside = ((pixel >= 0) & (pixel < pixel.new_tensor([height, width]))).all(1)
            index = (pixel[inside] @ pixel.new_tensor([width, 1])).long()
            weights.index_add_(0, index, weight[inside])
    return weights.reshape(height, width)


def _merge(positions: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Merge points at the same position [n, 2] and add their strengths."""
    _, group = torch.unique(torch.round(positions / MERGE_DISTANCE), dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1 if len(group) else 0,), len(group), device=group.device)
    first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    return positions[first], torch.zeros_like(first, dtype=strength.dtype).index_add_(0, group, strength)


def _collect(points: Sequence[tuple[str, Tensor, Tensor]], max_points: int | None) -> SamplingPoints:
    """Combine the positions and strengths of layers, given by name, and keep the strongest points."""
    names = list(dict.fromkeys(name for name, _, _ in points))
    positions, strength = (torch.cat(parts) for parts in list(zip(*points))[1:])
    layer = torch.cat([torch.full_like(each, names.index(name), dtype=torch.int64) for name, _, each in points])
    kept = torch.argsort(strength, descending=True, stable=True)[:max_points]
    return SamplingPoints(positions[kept], strength[kept], names, layer[kept])


def _known_grid(call: ConvCall | PoolCall, grid: Grid | None) -> Grid:
    if grid is None:
        raise ArgumentError(f"node must depend on maps with a place in the image, the input of {call.name!r} {LOST}")
    return grid
