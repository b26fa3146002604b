"""Where the sampling layers of a network look, and how much each place matters (figures 1 and 2 of the paper)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .graph import NODE, Feeds, Graph
from .nodes import LayerNode, Node, Respond, as_image, as_node, check_count, layer_map, magnitude, respond
from .places import LOST, Grid
from .recording import ConvCall, PoolCall, Recorder, undisturbed

MERGED = 1e-3  # pixels of the image: points that are nearer to each other are one
COARSER = 1.4  # times the scale of another map; sizes that are not divisible make small differences


class SamplingPoints(NamedTuple):
    """Points in an image.

    Attributes
    ----------
    positions : Tensor [n, 2], float64
        (y, x) in pixels of the image; the centre of its first pixel is (0, 0). Some lie outside.
    strength : Tensor [n], float64
        Strongest first.
    layers : list of str
        The layers that sample there.
    layer : Tensor [n], int64
        Index into `layers` for each point.
    """

    positions: Tensor
    strength: Tensor
    layers: list[str]
    layer: Tensor


class Bins(NamedTuple):
    """The bins of a region.

    Attributes
    ----------
    boxes : Tensor [P, Q, 4], float64
        x1, y1, x2, y2 in pixels of the image, as boxes are given to RoI pooling: the corner of the image is 0.
    strength : Tensor [P, Q], float64
    mask : Tensor [P, Q], float64, or None
        The modulation of each bin; v1 and RoIAlign have none.
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
    """The points of the image that a pixel of a map looks at through a stack of convolutions.

    The last convolution of the stack samples its input at kh*kw points for each deformable group; a point lies between
    pixels, each of which the convolution below has sampled, and so on. With three layers of 3x3 that makes 9*9*9
    points, those of regular convolutions on a grid. Masks of v2 weaken points.

    Parameters
    ----------
    model : torch.nn.Module
        With layers of this library, of ``torchvision.ops``, or regular convolutions. Of a detector of torchvision's
        kind the backbone runs.
    image : Tensor [C, H, W] or [1, C, H, W]
        The network's input, normalised.
    node : LayerNode or (layer, y, x)
    depth : int or None
        Convolutions that follow each other in the stack, at most: the last ones before the node with a kernel larger
        than 1x1, without those that make offsets. Parallel branches all belong to it. Where a shortcut leads round a
        convolution, the convolution counts, unless it is on a coarser map than the node's (the way down of a feature
        pyramid). None for all before the node, those on coarser maps among them.
    layers : sequence of str, optional
        Their names instead, in any order.
    max_points : int, optional
        How many are given at most, the strongest.

    Returns
    -------
    SamplingPoints
        Of the layers at the far ends of the stack, one as a rule. Points of a layer at the same place are one. The
        strength of a path from the node to a point is the product of the masks on it and of the bilinear weights of
        the pixels between two layers; that of a point is the sum over its paths.

    Raises
    ------
    ArgumentError
        The node does not exist, or there is no such convolution before it, or an argument is not legal.
    ShapeError
        `image` is none.

    Notes
    -----
    The model stays as it is: it runs in evaluation mode, and its modes and gradients are restored; what it raises
    itself passes through. Where a layer's pixels lie in the image is followed through strides, padding, pooling and
    interpolation. Points without a finite place are left out.

    Examples
    --------
    Two regular convolutions of 3x3 see 5x5 pixels, the middle one in 9 ways:

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
    with undisturbed(model):
        response = _respond(model, as_image(image), node)
        stack = _stack(response, depth, layers)
        if response.root is None:
            raise ArgumentError(f"node must have a place in the image, the map of {node.layer!r} {LOST}")
        ends = _tree(stack, response.root, node)
    by_name: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for number in sorted(ends, reverse=True):
        by_name[stack.calls[number].name] += ends[number]
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
    """The sampling points of all layers of a stack, and how much the node's response changes when one moves.

    Parameters
    ----------
    model, image : as in `sampling_locations`
    node : LayerNode, RoINode, their plain tuples, or a function (model, images) -> response
    depth, layers, max_points : as in `sampling_locations`

    Returns
    -------
    SamplingPoints
        One for each layer, deformable group, tap and output pixel that the response depends on. The strength is the
        norm of the gradient of the response's norm with respect to the point's (y, x), per pixel of the image.

    Raises
    ------
    ArgumentError, ShapeError
        As in `sampling_locations`.

    Notes
    -----
    Regular convolutions are run as deformable ones with offsets of zero, so that networks can be compared. Bilinear
    interpolation has a kink at whole positions: the derivative there is the right one, as in the gradient of the
    operation. The gradient is the whole one, also through the branches that make the offsets of layers above.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support import effective_sampling_locations
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), ModulatedDeformConv2dPack(4, 8, 3))
    >>> points = effective_sampling_locations(network, torch.rand(1, 20, 20), ("1", 5, 5))
    >>> points.layers, points.layer.bincount().tolist()  # each of the 9 points is a pixel below
    (['1', '0'], [9, 81])
    """
    _check_counts(depth, max_points)
    node = as_node(node)
    with undisturbed(model):
        response = _respond(model, as_image(image), node)
        calls = list(_stack(response, depth, layers).calls.values())
        gradients = response.gradients(calls)
    points = []
    for call, gradient in zip(calls, gradients):
        grid = _known_grid(call, call.input_grid)
        size = gradient.shape[2:]
        scale = torch.tensor(grid.scale, dtype=torch.float64, device=gradient.device)
        per_pixel = gradient.double().reshape(-1, 2, *size) / scale[:, None, None]
        strength = torch.linalg.vector_norm(per_pixel, dim=1).flatten()
        position = grid.to_image(call.positions()[0].flatten(0, 1)).flatten(0, 2)
        seen = (strength > 0) & position.isfinite().all(1)
        points.append((call.name, position[seen], strength[seen]))
    return _collect(points, max_points)


def effective_bin_locations(model: nn.Module, image: Tensor, node: Node) -> Bins:
    """The bins of a region's pooling, and how much the node's response changes when one moves.

    Parameters
    ----------
    model, image : as in `sampling_locations`
    node : RoINode, its plain tuple, or a function (model, images) -> response
        If several regions or levels are pooled, the last pooling that the response depends on counts.

    Returns
    -------
    Bins
        The strength is the norm of the gradient of the response's norm with respect to the bin's (y, x), per pixel of
        the image. RoIAlign counts as deformable with offsets of zero; torchvision's, which by default is not aligned,
        has its bins half a pixel of the map further right and down.

    Raises
    ------
    ArgumentError
        No region is pooled for the response.
    ShapeError
        `image` is none.

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
    with undisturbed(model):
        response = _respond(model, as_image(image), node)
        pools = [call for call in response.graph.calls.values() if isinstance(call, PoolCall)]
        if not pools:
            raise ArgumentError("node must depend on a deformable RoI pooling or RoIAlign, there is none before it")
        call = pools[-1]
        gradient = response.gradients([call])[0].double()
    # The region that the response depends on most is the node's; there is one as a rule.
    region = int(gradient.abs().sum((1, 2, 3)).argmax())
    scale = gradient.new_tensor(_known_grid(call, call.input_grid).scale[::-1])
    # Pooling takes the map's pixels for tiles of the image.
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
    """A node's response to an image: its norm, the grid of the node's map if it has one, and what it is made of."""

    value: Tensor
    root: Grid | None
    graph: Graph

    def gradients(self, calls: Sequence[ConvCall | PoolCall]) -> tuple[Tensor, ...]:
        """With respect to what was added to the offsets of each call."""
        return torch.autograd.grad(self.value, [call.probe.delta for call in calls if call.probe is not None])


def _respond(model: nn.Module, image: Tensor, node: Respond) -> _Response:
    with Recorder(model, image, probe=True) as recorder:
        if isinstance(node, LayerNode):
            feature_map = layer_map(model, image, node.layer)
            graph = Graph(value := magnitude(node.of(feature_map)), recorder.calls)
            return _Response(value, recorder.grids[feature_map], graph)
        graph = Graph(value := magnitude(respond(node, model, image)), recorder.calls)
    pools = [call.input_grid for call in graph.calls.values() if isinstance(call, PoolCall)]
    return _Response(value, pools[-1] if pools else None, graph)


class _Stack(NamedTuple):
    """The convolutions that are looked at.

    Attributes
    ----------
    calls : dict of int to ConvCall
        By number, the last one first.
    feeds : Feeds
    depth : int
        How many of them follow each other at most.
    """

    calls: dict[int, ConvCall]
    feeds: Feeds
    depth: int


def _stack(response: _Response, depth: int | None, layers: Sequence[str] | None) -> _Stack:
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
        # Those in the head that has been given regions lie nowhere.
        chosen = {number for number, call in calls.items() if call.input_grid is not None} or set(calls)
        if depth is not None:
            detours = {number for number in chosen if _coarser(calls[number].output_grid, response.root)}
    steps = len(calls) if depth is None or layers is not None else depth
    feeds = response.graph.feeds(chosen, detours)
    reached: set[int] = set()
    front = {NODE}
    for _ in range(steps):
        front = {number for above in front for number in feeds[above]}
        reached |= front
    for number in reached:
        if (batch := len(calls[number].offset)) != 1:
            raise ArgumentError(f"model must run {calls[number].name!r} on one image at a time, it ran on {batch}")
    return _Stack({number: calls[number] for number in sorted(reached, reverse=True)}, feeds, steps)


def _coarser(grid: Grid | None, root: Grid | None) -> bool:
    return grid is not None and root is not None and max(a / b for a, b in zip(grid.scale, root.scale)) > COARSER


def _tree(stack: _Stack, root: Grid, node: LayerNode) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """What the calls at the far ends of the stack sample: positions in the image and strengths, by the calls' numbers.

    A step leads from points in the input of each call to pixels in the results of those that feed it, and on to what
    those sample.
    """
    device = next(iter(stack.calls.values())).offset.device
    where = torch.tensor([[node.y, node.x]], dtype=torch.float64, device=device)
    front = {NODE: (root, where, where.new_ones(1))}
    found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for step in range(stack.depth):
        weights: dict[int, Tensor] = {}
        for above, (grid, where, strength) in front.items():
            for number in stack.feeds[above]:
                call = stack.calls[number]
                positions = grid.moved(where, _known_grid(call, call.output_grid))
                share = _spread(positions, strength, call.offset.shape[2:])
                weights[number] = weights[number] + share if number in weights else share
        front = {}
        for number, share in weights.items():
            call = stack.calls[number]
            where, strength = _sampled(call, share)
            grid = _known_grid(call, call.input_grid)
            if step + 1 < stack.depth and stack.feeds[number]:
                front[number] = grid, where, strength
            else:
                found[number].append((grid.to_image(where), strength))
    return found


def _sampled(call: ConvCall, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Where a call samples its input for the pixels of its result, and the strengths, that count [H, W] each."""
    rows, columns = torch.nonzero(weights, as_tuple=True)
    where = call.positions()[0][:, :, rows, columns]
    strength = weights[rows, columns].expand(where.shape[:-1])
    if call.mask is not None:
        strength = strength * call.mask[0].double().unflatten(0, where.shape[:2])[:, :, rows, columns]
    finite = where.isfinite().all(-1)
    return where[finite], strength[finite]


def _spread(positions: Tensor, strength: Tensor, size: Sequence[int]) -> Tensor:
    """What bilinear interpolation at positions [n, 2] takes of each pixel of a map [H, W], times the strengths [n]."""
    height, width = size
    weights = positions.new_zeros(height * width)
    corner = positions.floor()
    for dy in (0, 1):
        for dx in (0, 1):
            pixel = corner + corner.new_tensor([dy, dx])
            share = (1 - (positions - pixel).abs()).prod(1) * strength
            inside = ((pixel >= 0) & (pixel < pixel.new_tensor([height, width]))).all(1)
            index = (pixel[inside] @ pixel.new_tensor([width, 1])).long()
            weights.index_add_(0, index, share[inside])
    return weights.reshape(height, width)


def _merge(positions: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Points at different places [n, 2]; the strengths of those at the same place are added."""
    _, group = torch.unique(torch.round(positions / MERGED), dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1 if len(group) else 0,), len(group), device=group.device)
    first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    return positions[first], torch.zeros_like(first, dtype=strength.dtype).index_add_(0, group, strength)


def _collect(points: Sequence[tuple[str, Tensor, Tensor]], max_points: int | None) -> SamplingPoints:
    """The positions and strengths of several layers, by name, strongest first, cut off at a number."""
    names = list(dict.fromkeys(name for name, _, _ in points))
    positions, strength = (torch.cat(parts) for parts in list(zip(*points))[1:])
    layer = torch.cat([torch.full_like(each, names.index(name), dtype=torch.int64) for name, _, each in points])
    kept = torch.argsort(strength, descending=True, stable=True)[:max_points]
    return SamplingPoints(positions[kept], strength[kept], names, layer[kept])


def _known_grid(call: ConvCall | PoolCall, grid: Grid | None) -> Grid:
    if grid is None:
        raise ArgumentError(f"node must depend on maps with a place in the image, the input of {call.name!r} {LOST}")
    return grid
