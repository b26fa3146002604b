"""Which pixels of the image a node responds to (section 2 of the paper)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError

from .nodes import Node, Respond, as_image, as_node, check_count, magnitude, respond
from .recording import undisturbed


class SaliencyRegion(NamedTuple):
    """A region of an image that keeps a node's response.

    Attributes
    ----------
    mask : Tensor [H, W], bool
        The pixels that are kept.
    error : float
        The relative error of the response to them alone, ``norm(N(I) - N(I*M)) / norm(N(I))``.
    areas : list of int
        The number of kept pixels after each step of the search; it never grows.
    forwards : int
        Images that the network has been run on.
    finished : bool
        Whether no more could be dropped; False if the budget was used up before.
    """

    mask: Tensor
    error: float
    areas: list[int]
    forwards: int
    finished: bool


def effective_receptive_field(model: nn.Module, image: Tensor, node: Node) -> Tensor:
    """How much a node's response changes with each pixel of the image.

    Parameters
    ----------
    model : torch.nn.Module
        Any. Of a detector of torchvision's kind the backbone runs, and for a RoINode the box head.
    image : Tensor [C, H, W] or [1, C, H, W]
        The network's input, normalised.
    node : LayerNode, RoINode, their plain tuples, or a function (model, images) -> response

    Returns
    -------
    Tensor [H, W]
        The gradient of the norm of the response with respect to each pixel: absolute values, summed over the channels.

    Raises
    ------
    ArgumentError
        The node does not exist.
    ShapeError
        `image` is none.

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
    with undisturbed(model):
        images = as_image(image).requires_grad_()
        response = magnitude(respond(node, model, images.clone()))  # which the model may change in place
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
    """A small region that gives a node nearly the response that the whole image gives it.

    The paper calls for the smallest one. The search shrinks a rectangle from its sides, then drops square cells from
    it, those first without which the response changes least, as long as the relative error is within the bound. Pixels
    outside the region are 0, which in a normalised image is the mean colour.

    Parameters
    ----------
    model, image, node : as in `effective_receptive_field`
        The network must compute each image of a batch by itself, as networks in evaluation mode do.
    bound : float
        Largest relative error of the response, between 0 and 1.
    cell : int, optional
        Side of a cell, pixels. By default the image's longer side is 32 cells, or fewer if the budget is small: a step
        of the search tries each cell.
    batch_size : int
        Images that are run at a time.
    budget : int
        Images that are run in all; the search ends where they are used up, with what it has.
    progress : bool, optional
        Whether to show a bar, for which tqdm is needed; by default on a terminal if tqdm is there.

    Returns
    -------
    SaliencyRegion

    Raises
    ------
    ArgumentError
        The node does not exist or does not respond to the image, or a number is not legal.
    ShapeError
        `image` is none.

    Examples
    --------
    A node that sees 3x3 pixels:

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
    with undisturbed(model), torch.no_grad():
        images = as_image(image)
        search = _Search(model, images, as_node(node), bound, batch_size, budget, _bar(progress, budget))
        try:
            side = cell or math.ceil(max(images.shape[2:]) / max(1, min(32, math.isqrt(budget // 4))))
            finished = search.shrink(side) and search.drop(side)
        finally:
            search.bar.close()
    return SaliencyRegion(search.mask, search.error, search.areas, search.forwards, finished)


class _Search:
    """The state of a search: the region, its error, and how it came about."""

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        node: Respond,
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
        self.forwards = 1
        self.reference = respond(node, model, image.clone())  # which the model may change in place
        self.norm = float(magnitude(self.reference))
        if not self.norm > 0:
            raise ArgumentError(f"node must respond to the image, its response has the norm {self.norm}")

    def shrink(self, side: int) -> bool:
        """Take strips off a rectangle, thinner and thinner ones; False where the budget ends it."""
        height, width = self.mask.shape
        rectangle = [0, 0, height, width]  # top, left, bottom, right
        step = max(height, width) // 2
        while True:
            candidates = [
                shrunk
                for edge, sign in enumerate((1, 1, -1, -1))
                for shrunk in [[*rectangle[:edge], rectangle[edge] + sign * step, *rectangle[edge + 1 :]]]
                if shrunk[0] < shrunk[2] and shrunk[1] < shrunk[3]
            ]
            masks = [self._rectangle(candidate) for candidate in candidates]
            if len(masks) > self.left():
                return False
            errors = self.errors(masks)
            best = min(range(len(masks)), key=errors.__getitem__, default=None)
            if best is not None and errors[best] <= self.bound:
                rectangle = candidates[best]
                self._accept(masks[best], errors[best])
            elif step <= side:
                return True
            else:
                step = max(step // 2, side)

    def drop(self, side: int) -> bool:
        """Drop cells, the least important ones first, until none can go; False where the budget ends it."""
        height, width = self.mask.shape
        while True:
            cells = [
                (slice(top, top + side), slice(left, left + side))
                for top in range(0, height, side)
                for left in range(0, width, side)
                if self.mask[top : top + side, left : left + side].any()
            ]
            if len(cells) > self.left():
                return False
            errors = self.errors([self._without(cells[index : index + 1]) for index in range(len(cells))])
            order = sorted(range(len(cells)), key=errors.__getitem__)
            possible = [cells[index] for index in order if errors[index] <= self.bound]
            if len(possible) == len(cells):
                possible.pop()  # nothing at all is no region
            if not possible:
                return True
            if not self._drop_in_order(possible):
                return False

    def _drop_in_order(self, cells: Sequence[tuple[slice, slice]]) -> bool:
        """Drop as many of the cells at a time as the bound allows, until that is none; False: the budget ends it."""
        begin, number = 0, len(cells)
        while begin < len(cells):
            numbers = []
            while number:
                numbers.append(number)
                number //= 2
            masks = [self._without(cells[begin : begin + count]) for count in numbers]
            if len(masks) > self.left():
                return False
            errors = self.errors(masks)
            chosen = next((index for index, error in enumerate(errors) if error <= self.bound), None)
            if chosen is None:
                return True
            self._accept(masks[chosen], errors[chosen])
            begin += numbers[chosen]
            number = min(2 * numbers[chosen], len(cells) - begin)
        return True

    def errors(self, masks: Sequence[Tensor]) -> list[float]:
        """The relative error of the response for each mask [H, W]; one that is not a number counts as infinite."""
        found: list[float] = []
        for begin in range(0, len(masks), self.batch_size):
            batch = torch.stack(list(masks[begin : begin + self.batch_size]))
            # Not a product: what is not a number outside the region must not matter.
            response = respond(self.node, self.model, torch.where(batch[:, None], self.image, 0))
            difference = torch.linalg.vector_norm((response - self.reference).double(), dim=1)
            found += (difference / self.norm).nan_to_num(nan=float("inf")).tolist()
            self.forwards += len(batch)
            self.bar.update(len(batch))
            self.bar.set_postfix_str(f"{self.areas[-1] / self.areas[0]:.1%} of the image, error {self.error:.3f}")
        return found

    def left(self) -> int:
        """Images that may still be run."""
        return self.budget - self.forwards

    def _accept(self, mask: Tensor, error: float) -> None:
        self.mask, self.error = mask, error
        self.areas.append(int(mask.sum()))

    def _rectangle(self, sides: Sequence[int]) -> Tensor:
        top, left, bottom, right = sides
        mask = torch.zeros_like(self.mask)
        mask[top:bottom, left:right] = True
        return mask

    def _without(self, cells: Sequence[tuple[slice, slice]]) -> Tensor:
        mask = self.mask.clone()
        for cell in cells:
            mask[cell] = False
        return mask


class _NoBar:
    def update(self, number: int) -> None: ...
    def set_postfix_str(self, text: str) -> None: ...
    def close(self) -> None: ...


def _bar(progress: bool | None, budget: int) -> Any:
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ArgumentError("progress=True needs tqdm: pip install tqdm") from None
        return _NoBar()
    return tqdm(total=budget, unit="image", leave=False)
