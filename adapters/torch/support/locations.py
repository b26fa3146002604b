"""Where the sampling layers of a network look, and how much each place matters (figures 1 and 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .grids import Grid
from .nodes import LayerNode, Node, Respond, as_image, as_node, layer_map, magnitude
from .recording import ConvCall, PoolCall, Probe, Recorder, undisturbed

__all__ = ["Bins", "SamplingPoints", "effective_bin_locations", "effective_sampling_locations", "sampling_locations"]

Call = TypeVar("Call", ConvCall, PoolCall)

MERGED = 1e-3  # pixels of the image: points that are nearer to each other are one


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
    depth: int = 3,
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
    depth : int
        Convolutions in the stack, at most: the last ones before the node with a kernel larger than 1x1, in the order
        in which they run, without those that make offsets, and without those on coarser maps than the node's (the way
        down of a feature pyramid).
    layers : sequence of str, optional
        Their names instead, in any order.
    max_points : int, optional
        How many are given at most, the strongest.

    Returns
    -------
    SamplingPoints
        Points at the same place are one. The strength of a path from the node to a point is the product of the masks
        on it and of the bilinear weights of the pixels between two layers; that of a point is the sum over its paths.

    Raises
    ------
    ArgumentError
        The node does not exist, or there is no such convolution before it.
    ShapeError
        `image` is none.

    Notes
    -----
    The model stays as it is: it runs in evaluation mode, and its modes and gradients are restored. Where a layer's
    pixels lie in the image is followed through strides, padding, pooling and interpolation. Points without a finite
    place are left out.

    Examples
    --------
    Two regular convolutions of 3x3 see 5x5 pixels, the middle one in 9 ways:

    >>> import torch
    >>> from dcnops.adapters.torch.support import sampling_locations
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    >>> points = sampling_locations(network, torch.rand(1, 20, 20), ("1", 10, 10), depth=2)
    >>> len(points.positions), points.positions[0].tolist(), points.strength[0].item()
    (25, [10.0, 10.0], 9.0)
    """
    node = as_node(node)
    if not isinstance(node, LayerNode):
        raise ArgumentError(f"node must be (layer, y, x): regions have effective_bin_locations, got {node!r}")
    with undisturbed(model):
        images = as_image(image)
        response = _respond(model, images, node, "held")
        calls = _ancestors(response, ConvCall)
    stack = [calls[number] for number in _stack(calls, response.root, depth, layers)]
    positions, strength = _merge(*_tree(stack, response.root or _known_grid(stack[0], stack[0].output_grid), node))
    kept = _strongest(strength, max_points)
    layer = torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
    return SamplingPoints(positions[kept], strength[kept], [stack[-1].name], layer)


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
    depth : int or None
        Convolutions in the stack, as in `sampling_locations`; None for all before the node, those on coarser maps
        among them.
    layers : sequence of str, optional
        Their names instead.
    max_points : int, optional
        How many are given at most, the strongest.

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
    >>> from dcnops.adapters.torch.support import effective_sampling_locations
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), ModulatedDeformConv2dPack(4, 8, 3))
    >>> points = effective_sampling_locations(network, torch.rand(1, 20, 20), ("1", 5, 5))
    >>> points.layers, points.layer.bincount().tolist()  # each of the 9 points is a pixel below
    (['1', '0'], [9, 81])
    """
    node = as_node(node)
    with undisturbed(model):
        images = as_image(image)
        held = _respond(model, images, node, "held")
        stack = _stack(_ancestors(held, ConvCall), held.root, depth, layers)
        full = _respond(model, images, node, "full")
        calls = [call for number in stack if isinstance(call := full.calls[number], ConvCall)]
        gradients = full.gradients(calls)
    positions, strengths, numbers, names = [], [], [], []
    for index, (call, gradient) in enumerate(zip(calls, gradients)):
        assert gradient is not None
        grid = _known_grid(call)
        size = gradient.shape[2:]
        scale = torch.tensor(grid.scale, dtype=torch.float64, device=gradient.device)
        per_pixel = gradient.double().reshape(-1, 2, *size) / scale[:, None, None]
        strength = torch.linalg.vector_norm(per_pixel, dim=1).flatten()
        position = grid.to_image(call.positions()[0].flatten(0, 1)).flatten(0, 2)
        rows = torch.where((strength > 0) & position.isfinite().all(1))[0]
        positions.append(position[rows])
        strengths.append(strength[rows])
        numbers.append(torch.full_like(rows, index))
        names.append(call.name)
    strength = torch.cat(strengths)
    kept = _strongest(strength, max_points)
    return SamplingPoints(torch.cat(positions)[kept], strength[kept], names, torch.cat(numbers)[kept])


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
    >>> from dcnops.adapters.torch.support import effective_bin_locations
    >>> detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
    ...     weights=None, weights_backbone=None, num_classes=5)
    >>> detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], DeformRoIPool(7))
    >>> bins = effective_bin_locations(detector, torch.rand(3, 64, 96), ((10, 10, 66, 52), 3))
    >>> bins.boxes[0, 0], bins.strength.shape
    (tensor([10., 10., 18., 16.], dtype=torch.float64), torch.Size([7, 7]))
    """
    node = as_node(node)
    with undisturbed(model):
        images = as_image(image)
        response = _respond(model, images, node, "full")
        pools = list(_ancestors(response, PoolCall).values())
        if not pools:
            raise ArgumentError("node must depend on a deformable RoI pooling or RoIAlign, there is none before it")
        call = pools[-1]
        (found,) = response.gradients([call])
    assert found is not None
    gradient = found.double()
    # The region that the response depends on most is the node's; there is one as a rule.
    region = int(gradient.abs().sum((1, 2, 3)).argmax())
    scale = gradient.new_tensor(_known_grid(call).scale[::-1])
    # Pooling takes the map's pixels for tiles of the image.
    boxes = call.boxes()[region] * scale.repeat(2)
    extent = (call.rois[region, 3:] - call.rois[region, 1:3]).double() * scale
    per_pixel = torch.where(extent == 0, 0.0, gradient[region].movedim(0, -1) / extent)
    mask = None if call.mask is None else call.mask[region].double()
    return Bins(boxes, torch.linalg.vector_norm(per_pixel, dim=-1), mask, call.name)


class _Response(NamedTuple):
    """A node's response to an image: its norm, the grid of the node's map if it has one, and what was called."""

    value: Tensor
    root: Grid | None
    calls: list[ConvCall | PoolCall]

    def gradients(self, calls: Sequence[ConvCall | PoolCall]) -> list[Tensor | None]:
        """With respect to what was added to the offsets of each call; None for those it does not depend on."""
        deltas = [call.delta for call in calls if call.delta is not None]
        if not deltas or not self.value.requires_grad:
            return [None] * len(deltas)
        return list(torch.autograd.grad(self.value, deltas, retain_graph=True, allow_unused=True))


def _respond(model: nn.Module, images: Tensor, node: Respond, probe: Probe) -> _Response:
    with Recorder(model, images, probe) as recorder:
        if isinstance(node, LayerNode):
            feature_map = layer_map(model, images, node.layer)
            return _Response(magnitude(node.of(feature_map)), recorder.grids[feature_map], recorder.calls)
        return _Response(magnitude(node(model, images)), None, recorder.calls)


def _ancestors(response: _Response, kind: type[Call]) -> dict[int, Call]:
    """The calls of a kind that the response is made of, by their numbers; not those that make offsets for others."""
    numbers = [number for number, call in enumerate(response.calls) if call.delta is not None]
    gradients = response.gradients([response.calls[number] for number in numbers])
    return {
        number: call
        for number, gradient in zip(numbers, gradients)
        if gradient is not None and isinstance(call := response.calls[number], kind)
    }


def _stack(calls: dict[int, ConvCall], root: Grid | None, depth: int | None, layers: Sequence[str] | None) -> list[int]:
    """The numbers of the chosen calls, the last one first."""
    names = {number: call.name for number, call in calls.items()}
    if not names:
        raise ArgumentError("node must depend on a convolution with a kernel larger than 1x1, there is none before it")
    if layers is not None:
        if unknown := set(layers) - set(names.values()):
            raise ArgumentError(f"layers must be among {list(names.values())}, got {sorted(unknown)}")
        return [number for number in reversed(names) if names[number] in layers]
    if depth is None:
        return list(reversed(names))
    if depth < 1:
        raise ArgumentError(f"depth must be at least 1, got {depth}")
    fine = [number for number, call in calls.items() if root is None or not _coarser(call.output_grid, root)]
    return (fine or list(names))[-depth:][::-1]


def _coarser(grid: Grid | None, root: Grid) -> bool:
    return grid is not None and max(a / b for a, b in zip(grid.scale, root.scale)) > 1.01


def _tree(stack: Sequence[ConvCall], root: Grid, node: LayerNode) -> tuple[Tensor, Tensor]:
    """Positions in the image and strengths of what the last of the calls samples; the first one is next to the node."""
    where = torch.tensor([[node.y, node.x]], dtype=torch.float64, device=stack[0].offset.device)
    strength = where.new_ones(1)
    grid = root
    for call in stack:
        # The pixels of this call's result, and how much each counts.
        output = _known_grid(call, call.output_grid)
        weights = _spread(output.from_image(grid.to_image(where)), strength, call.offset.shape[2:])
        rows, columns = torch.nonzero(weights, as_tuple=True)
        where = call.positions()[0][:, :, rows, columns]
        strength = weights[rows, columns].expand(where.shape[:-1])
        if call.mask is not None:
            strength = strength * call.mask[0].double().unflatten(0, where.shape[:2])[:, :, rows, columns]
        finite = where.isfinite().all(-1)
        where, strength = where[finite], strength[finite]
        grid = _known_grid(call)
    return grid.to_image(where), strength


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


def _strongest(strength: Tensor, max_points: int | None) -> Tensor:
    """The rows of the strongest points, strongest first."""
    if max_points is not None and max_points < 1:
        raise ArgumentError(f"max_points must be at least 1, got {max_points}")
    return torch.argsort(strength, descending=True, stable=True)[:max_points]


def _known_grid(call: ConvCall | PoolCall, grid: Grid | None = None) -> Grid:
    grid = grid or call.input_grid
    if grid is None:
        raise ArgumentError(f"node must depend on the image alone: the input of {call.name!r} cannot be located in it")
    return grid
