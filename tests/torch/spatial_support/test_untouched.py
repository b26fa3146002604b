"""State of a model, its input and the random generator after a view."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnops.adapters.torch import DeformConv2dPack, ModulatedDeformConv2dPack
from dcnops.adapters.torch.spatial_support import (
    LayerNode,
    OffsetObserver,
    effective_receptive_field,
    effective_sampling_locations,
    offset_statistics,
)
from tests.torch.spatial_support.networks import VIEWS, Function, randomise_branches


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("in the middle")


def state_of(model: nn.Module) -> list[Any]:
    parts: list[Any] = [dict(model.state_dict())]
    for name, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
        hooks = [len(getattr(module, kind)) for kind in kinds]
        parts.append((name, module.training, hooks, sorted(vars(module))))
    parts += [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return copy.deepcopy(parts)


def same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_view_restores_the_model(view: Any, fails: bool) -> None:
    torch.manual_seed(10)
    network = randomise_branches(
        nn.Sequential(
            ModulatedDeformConv2dPack(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.Conv2d(4, 4, 3, padding=1),
            Failing() if fails else nn.Identity(),
            nn.Conv2d(4, 3, 3),
        )
    )
    network[1].eval()
    network[3].requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    image = torch.rand(2, 12, 12)
    before, random = state_of(network), torch.get_rng_state()
    with torch.no_grad():
        if fails:
            with pytest.raises(ValueError, match="in the middle"):
                view(network, image, ("5", 3, 3))
        else:
            view(network, image, ("5", 3, 3))
        assert not torch.is_grad_enabled()
    assert same_state(state_of(network), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not image.requires_grad
    if not fails:
        network(image[None])


def test_a_model_may_modify_its_input_in_place() -> None:
    torch.manual_seed(11)
    layers = nn.ReLU(), DeformConv2dPack(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, bias=False)
    plain = randomise_branches(nn.Sequential(*layers))
    in_place = copy.deepcopy(plain)
    in_place[0] = Function("", lambda x: x.sub_(0.2).mul_(2).relu_())
    plain[0] = Function("", lambda x: ((x - 0.2) * 2).relu())
    image = torch.rand(2, 12, 12)
    kept = image.clone()
    for view in VIEWS[:4]:
        one, other = (view(network, image, ("2", 4, 5)) for network in (in_place, plain))
        assert torch.equal(image, kept)
        assert same_state(*((tuple(found) if isinstance(found, tuple) else (found,)) for found in (one, other)))
    one, other = (offset_statistics(network, image)["1"].offsets for network in (in_place, plain))
    assert torch.equal(image, kept) and torch.equal(one, other)


def test_an_observer_ignores_the_views() -> None:
    network, image = nn.Sequential(DeformConv2dPack(2, 3, 3), nn.Conv2d(3, 2, 3)), torch.rand(2, 9, 9)
    with OffsetObserver(network) as observer, OffsetObserver(network[0]) as inner:
        for view in VIEWS:
            view(network, image, ("1", 2, 2))
        LayerNode.at(network, image, "1", 2, 2)
        assert observer.statistics() == {}
        network(image[None])
    for each in (observer, inner):
        assert [len(found.offsets) for found in each.statistics().values()] == [9 * 49]


def test_views_run_in_inference_mode() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with torch.inference_mode():
        image = torch.rand(1, 9, 9)
        assert len(effective_sampling_locations(network, image, ("1", 2, 2)).positions) == 90
        assert effective_receptive_field(network, image, ("1", 2, 2)).shape == (9, 9)
        in_place = nn.Sequential(Function("", lambda x: x.sub_(0.5)), DeformConv2dPack(1, 1, 3))
        assert len(offset_statistics(in_place, image)["1"].offsets) == 9 * 49
        assert LayerNode.at(in_place, image, "1", 4, 5).position(in_place, image) == (4, 5)
