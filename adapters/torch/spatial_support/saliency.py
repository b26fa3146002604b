"""Pixels of the image that a node responds to (section 2 of the paper)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .nodes import Node, NodeFunction, as_image, as_node, check_count, magnitude, respond
from .recording import inspection


class SaliencyRegion(NamedTuple):
    """Region of an image that preserves a node's response.

    Attributes
    ----------
    mask : Tensor [H, W], bool
        True for the pixels in the region.
    error : float
        Relative error of the response to the region alone, ``norm(N(I) - N(I*M)) / norm(N(I) - N(0))``. It is 1 for an
        empty region.
    areas : list of int
        Number of pixels in the region after each step of the search; it never increases.
    forwards : int
        Number of masked images that the network was run on.
    finished : bool
        True if nothing more could be removed, False if the budget was used up before.
    """

    mask: Tensor
    error: float
    areas: list[int]
    forwards: int
    finished: bool


def effective_receptive_field(model: nn.Module, image: Tensor, node: Node) -> Tensor:
    """Compute the effect of each pixel of the image on a node's response.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. For a torchvision detector, the backbone runs, and for a RoINode the box head.
    image : Tensor [C, H, W] or [1, C, H, W]
        Normalised input of the network.
    node : LayerNode, RoINode, their plain tuples, or a function (model, images) -> response

    Returns
    -------
    Tensor [H, W]
        Gradient of the response's norm with respect to each pixel: absolute values, summed over the channels.

    Raises
    ------
    ArgumentError
        The node does not exist.
    ShapeError
        `image` is not a single image.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.spatial_support import effective_receptive_field
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    >>> field = effective_receptive_field(network, torch.rand(1, 20, 20), ("1", 10, 10))
    >>> field.shape, (field > 0).nonzero().aminmax(dim=0).min.tolist()
    (torch.Size([20, 20]), [8, 8])
    """
    node = as_node(node)
    with inspection(model):
        images = as_image(image).requires_grad_()
        response = magnitude(respond(node, model, images.clone()))  # the model may modify its input in place
        gradient = None
        if response.requires_grad:
            (gradient,) = torch.autograd.grad(response, images, allow_unused=True)
    return torch.zeros_like(images[0, 0]).detach() if gradient is None else gradient[0].abs().sum(0)


def error_bounded_saliency_region(
    model: nn.Module,
    image: Tensor,
    node: Node,
    *,
    bound: float = 0.1,
    cell: int | None = None,
    batch_size: int = 16,
    budget: int = 4000,
    progress: bool | None = None,
) -> SaliencyRegion:
    """Find a small region of the image that alone gives nearly the same response as the whole image.

    The paper asks for the smallest region. The search shrinks a rectangle from its sides. Then it removes square cells,
    first large and then smaller ones, starting with those that change the response least, as long as the relative error
    is within the bound. Pixels outside the region are 0, which is the mean colour of a normalised image.

    The error is relative to the difference between the responses to the image and to an empty image, ``N(0)``. Relative
    to the response itself it would depend on biases: a class score near zero would forbid any change, and a large bias
    would allow an empty region.

    Parameters
    ----------
    model, image, node : as in `effective_receptive_field`
        The network must compute the images of a batch independently, as networks in evaluation mode do.
    bound : float
        Maximum relative error of the response, in [0, 1).
    cell : int, optional
        Side of a cell, in pixels. By default the longer side of the image has 32 cells, or fewer for a small budget,
        because each step of the search tries every cell.
    batch_size : int
        Number of images in one forward pass.
    budget : int
        Maximum number of masked images in total. When it is used up, the search stops with the current region.
    progress : bool, optional
        Show a progress bar, which requires tqdm. By default it is shown on a terminal if tqdm is installed.

    Returns
    -------
    SaliencyRegion

    Raises
    ------
    ArgumentError
        The node does not exist, it responds to the image as to an empty one, or a number is out of range.
    ShapeError
        `image` is not a single image.

    Examples
    --------
    A node with a receptive field of 3x3 pixels:

    >>> import torch
    >>> from dcnops.adapters.torch.spatial_support import error_bounded_saliency_region
    >>> network = torch.nn.Conv2d(1, 4, 3, padding=1, bias=False)
    >>> image = torch.rand(1, 12, 12) + 1
    >>> region = error_bounded_saliency_region(network, image, ("", 5, 5), bound=0.001, cell=1)
    >>> region.mask.nonzero().aminmax(dim=0)
    torch.return_types.aminmax(
    min=tensor([4, 4]),
    max=tensor([6, 6]))
    """
    if not (isinstance(bound, Real) and 0 <= bound < 1):
        raise ArgumentError(f"bound must be a number in [0, 1), got {bound!r}")
    for name, value in (("batch_size", batch_size), ("budget", budget), ("cell", 1 if cell is None else cell)):
        check_count(name, value)
    with inspection(model), torch.no_grad():
        images = as_image(image)
        search = _Search(model, images, as_node(node), bound, batch_size, budget, _progress_bar(progress, budget))
        try:
            side = cell or math.ceil(max(images.shape[2:]) / max(1, min(32, math.isqrt(budget // 4))))
            # Large cells first: they need few images, and leave few of the small cells to be tried.
            finished = search.shrink_rectangle(side) and all(search.remove_cells(side << i) for i in (3, 2, 1, 0))
        finally:
            if search.bar is not None:
                search.bar.close()
    return SaliencyRegion(search.mask, search.error, search.areas, search.forwards, finished)


class _Search:
    """State of a search: the region, its error and the history."""

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        node: NodeFunction,
        bound: float,
        batch_size: int,
        budget: int,
        bar: Any,
    ) -> None:
        self.model, self.image, self.node = model, image, node
        self.bound, self.batch_size, self.budget, self.bar = bound, batch_size, budget, bar
        self.mask = torch.ones(image.shape[2:], dtype=torch.bool, device=image.device)
        self.error = 0.0
        self.areas = [self.mask.numel()]
        self.forwards = 0
        self.reference = respond(node, model, image.clone())  # the model may modify its input in place
        self.change = float(magnitude(self.reference - respond(node, model, torch.zeros_like(image))))
        if not 0 < self.change < math.inf:
            raise ArgumentError(
                f"node must respond to the image, its response differs by {self.change} from that to an empty image"
            )

    def shrink_rectangle(self, side: int) -> bool:
        """Remove thinner and thinner strips from a rectangle; return False if the budget is used up."""
        height, width = self.mask.shape
        rectangle = [0, 0, height, width]  # top, left, bottom, right
        step = max(height, width) // 2
        while True:
            candidates, masks = [], []
            for edge, sign in enumerate((1, 1, -1, -1)):
                shrunk = rectangle.copy()
                shrunk[edge] += sign * step
                top, left, bottom, right = shrunk
                if top < bottom and left < right:
                    candidates.append(shrunk)
                    masks.append(torch.zeros_like(self.mask))
                    masks[-1][top:bottom, left:right] = True
            if len(masks) > self._remaining_budget():
                return False
            errors = self._errors(masks)
            best = min(range(len(masks)), key=errors.__getitem__, default=None)
            if best is not None and errors[best] <= self.bound:
                rectangle = candidates[best]
                self._accept(masks[best], errors[best])
            elif step <= side:
                return True
            else:
                step = max(step // 2, side)

    def remove_cells(self, side: int) -> bool:
        """Remove cells, the least important first, as long as possible; return False if the budget is used up."""
        height, width = self.mask.shape
        while True:
            cells = [
                (slice(top, top + side), slice(left, left + side))
                for top in range(0, height, side)
                for left in range(0, width, side)
                if self.mask[top : top + side, left : left + side].any()
            ]
            if len(cells) > self._remaining_budget():
                return False
            errors = self._errors([self._without([cell]) for cell in cells])
            order = sorted(range(len(cells)), key=errors.__getitem__)
            removable = [cells[index] for index in order if errors[index] <= self.bound]
            if len(removable) == len(cells):
                removable.pop()  # the region must not become empty
            if not removable:
                return True
            if not self._remove_in_order(removable):
                return False

    def _remove_in_order(self, cells: Sequence[tuple[slice, slice]]) -> bool:
        """Remove as many cells at a time as the bound allows; return False if the budget is used up."""
        begin, number = 0, len(cells)
        while begin < len(cells):
            numbers = [number >> halvings for halvings in range(number.bit_length())]
            masks = [self._without(cells[begin : begin + count]) for count in numbers]
            if len(masks) > self._remaining_budget():
                return False
            errors = self._errors(masks)
            chosen = next((index for index, error in enumerate(errors) if error <= self.bound), None)
            if chosen is None:
                begin, number = begin + 1, 1  # this cell stays
                continue
            self._accept(masks[chosen], errors[chosen])
            begin += numbers[chosen]
            number = min(2 * numbers[chosen], len(cells) - begin)
        return True

    def _remaining_budget(self) -> int:
        return self.budget - self.forwards

    def _errors(self, masks: Sequence[Tensor]) -> list[float]:
        """Return the relative error of the response for each mask [H, W], infinite instead of NaN."""
        found: list[float] = []
        for begin in range(0, len(masks), self.batch_size):
            batch = torch.stack(list(masks[begin : begin + self.batch_size]))
            # Not a product, so that NaN outside the region does not matter.
            response = respond(self.node, self.model, torch.where(batch[:, None], self.image, 0))
            difference = torch.linalg.vector_norm((response - self.reference).double(), dim=1)
            found += (difference / self.change).nan_to_num(nan=float("inf")).tolist()
            self.forwards += len(batch)
            if self.bar is not None:
                self.bar.update(len(batch))
                self.bar.set_postfix_str(f"{self.areas[-1] / self.areas[0]:.1%} of the image, error {self.error:.3f}")
        return found

    def _accept(self, mask: Tensor, error: float) -> None:
        self.mask, self.error = mask, error
        self.areas.append(int(mask.sum()))

    def _without(self, cells: Sequence[tuple[slice, slice]]) -> Tensor:
        mask = self.mask.clone()
        for cell in cells:
            mask[cell] = False
        return mask


def _progress_bar(progress: bool | None, budget: int) -> Any:
    """Return a tqdm bar, or None if no bar is shown."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ArgumentError("progress=True needs tqdm: pip install tqdm") from None
        return None
    return tqdm(total=budget, unit="image", leave=False)
