"""Conversion of models, parameter groups and checkpoints of other libraries."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from dcnops import ArgumentError
from dcnops.adapters.torch import (
    DeformConv2d,
    DeformConv2dPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    convert_to_deformable,
    mmcv_ops,
    param_groups,
    rename_state_dict,
)

RESNET = ["layer2.*.conv2", "layer3.*.conv2", "layer4.*.conv2"]


class Block(nn.Module):
    def __init__(self, channels: int = 4, **options) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, **{"padding": 1, **options})
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn(self.conv2(self.conv1(x)))


def net(**options) -> nn.Sequential:
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), first=Block(**options), second=Block(**options))).eval()


def excite_branches(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset" in name:
                parameter.uniform_(-0.3, 0.3)
    return model


# convert_to_deformable


@pytest.mark.parametrize("modulated", [True, False])
def test_resnet50_gets_13_layers_and_misses_26_keys(modulated: bool):
    plain = torchvision.models.resnet50(weights=None)
    model = copy.deepcopy(plain)
    names = convert_to_deformable(model, RESNET, modulated)
    assert names == [f"layer{k}.{i}.conv2" for k, blocks in ((2, 4), (3, 6), (4, 3)) for i in range(blocks)]
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and len(missing) == 26
    assert sorted(missing) == sorted(f"{name}.conv_offset.{leaf}" for name in names for leaf in ("weight", "bias"))
    # Table 1 of Deformable ConvNets v2: parameters of the branches (v1, conv3-5).
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == (580_842 * 3 // 2 if modulated else 580_842)
    layer = model.get_submodule("layer3.0.conv2")
    assert (layer.stride, layer.padding, layer.bias) == ((2, 2), (1, 1), None)
    assert (layer.conv_offset.stride, layer.conv_offset.padding) == ((2, 2), (1, 1))


@pytest.mark.parametrize("modulated", [False, True])
def test_converted_model_computes_the_same(modulated: bool):
    model, x = net(dilation=2, padding=2), torch.randn(2, 3, 12, 12)
    expected = model(x)
    assert convert_to_deformable(model, "*.conv2", modulated, 2) == ["first.conv2", "second.conv2"]
    torch.testing.assert_close(model(x), expected)
    output = excite_branches(model)(x)
    assert not torch.allclose(output, expected)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_masks_of_the_paper_halve_the_output():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)), torch.randn(2, 3, 6, 6)
    expected = model(x) / 2
    convert_to_deformable(model, "0", mask_scale=1)
    torch.testing.assert_close(model(x), expected)


def test_parameters_stay_the_same_objects_and_no_random_numbers_are_drawn():
    model = net().double()
    model.first.conv2.train()
    before, state = dict(model.named_parameters()), torch.get_rng_state()
    model.first.conv2.requires_grad_(False)
    convert_to_deformable(model, "*.conv2")
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    layer = model.first.conv2
    assert type(layer) is ModulatedDeformConv2dPack and layer.training and layer.conv_offset.training
    assert not model.second.conv2.training and not model.second.conv2.conv_offset.training
    assert not layer.weight.requires_grad and layer.conv_offset.weight.requires_grad
    assert layer.conv_offset.weight.dtype == torch.float64 and not layer.conv_offset.weight.is_meta
    assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_function_as_selector():
    seen = []

    def where(name: str, conv: nn.Conv2d) -> bool:
        seen.append(name)
        return conv.kernel_size == (3, 3) and conv.in_channels == 4

    model = net()
    assert convert_to_deformable(model, where, modulated=False) == ["first.conv2", "second.conv2"]
    assert seen == ["stem", "first.conv1", "first.conv2", "second.conv1", "second.conv2"]
    model.first.conv2 = mmcv_ops.DeformConv2dPack(4, 4, 3)
    with pytest.raises(ArgumentError, match="the function is true for none"):
        convert_to_deformable(model, where)  # branches are convolutions too, but are skipped


def test_a_shared_convolution_stays_shared():
    model = net()
    model.second.conv2 = model.first.conv2
    assert convert_to_deformable(model, "second.conv2") == ["first.conv2", "second.conv2"]
    assert model.first.conv2 is model.second.conv2 and isinstance(model.first.conv2, ModulatedDeformConv2dPack)


@pytest.mark.parametrize(
    "options, padding",
    [
        ({"padding": "same"}, (1, 1)),
        ({"padding": "same", "dilation": (2, 3)}, (2, 3)),
        ({"padding": "same", "kernel_size": 2, "dilation": 2}, (1, 1)),
        ({"padding": "valid"}, (0, 0)),
        ({"padding": (0, 2)}, (0, 2)),
    ],
)
def test_padding(options: dict, padding: tuple[int, int]):
    model, x = nn.Sequential(nn.Conv2d(2, 3, **{"kernel_size": 3, **options})), torch.randn(1, 2, 8, 8)
    expected = model(x)
    convert_to_deformable(model, "0", modulated=False)
    assert model[0].padding == padding
    torch.testing.assert_close(model(x), expected)


def test_rejected_conversions_leave_the_model_unchanged():
    class Normed(nn.Conv2d):
        pass

    model = net()
    hooked = net()
    hooked.first.conv2.register_forward_hook(lambda *_: None)
    converted = net()
    convert_to_deformable(converted, "first.conv2")
    cases = [
        (model, "layer2.*.conv2", "nothing is named 'layer2.\\*.conv2'"),
        (model, ["*.conv2", "third.conv2"], "nothing is named 'third.conv2'"),
        (model, "first*", "but first is a .*Block"),
        (model, "*.bn", "but first.bn is a torch.nn.modules.batchnorm.BatchNorm2d"),
        (converted, "first.conv2", "but first.conv2 is a dcnops.adapters.torch.deform_conv2d_layers.Modulated"),
        (converted, "*.conv2*", "but first.conv2 is a dcnops"),
        (nn.Sequential(Normed(2, 2, 3)), "0", "but 0 is a .*Normed"),
        (nn.Sequential(Normed(2, 2, 3)), lambda name, conv: True, "but 0 is a .*Normed"),
        (nn.Sequential(nn.LazyConv2d(2, 3)), "0", "LazyConv2d"),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), "0", "ConvTranspose2d"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "0", "but 0 has 'reflect'"),
        (nn.Sequential(nn.Conv2d(2, 2, 2, padding="same")), "0", "padding='same' with kernel_size=\\(2, 2\\)"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))), "0", "Parametrized"),
        (hooked, "first.conv2", "but first.conv2 has some"),
        (model, ["second.conv2", "stem"], "in_channels must be a positive multiple of deform_groups=4, got 3"),
        (nn.Conv2d(2, 2, 3), "*", "nothing is named '\\*'"),
    ]
    for where_model, where, message in cases:
        before = list(where_model.modules())
        with pytest.raises(ArgumentError, match=message):
            convert_to_deformable(where_model, where, deform_groups=4 if message.startswith("in_channels") else 1)
        after = list(where_model.modules())
        assert len(before) == len(after) and all(a is b for a, b in zip(before, after))


# param_groups


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        convert_to_deformable(self.body, "*.conv2")
        self.other = mmcv_ops.DeformConv2dPack(4, 4, 3)
        self.pool = ModulatedDeformRoIPoolPack(3, 4, 8)
        self.body.stem.requires_grad_(False)


def test_param_groups():
    model = Detector()
    rest, offsets = param_groups(model, 0.02)
    assert rest["lr"] == 0.02 and offsets["lr"] == pytest.approx(0.002)
    assert set(rest) == set(offsets) == {"params", "lr"}
    names = {parameter: name for name, parameter in model.named_parameters()}
    slow = [names[parameter] for parameter in offsets["params"]]
    assert len(slow) == 6 and all("conv_offset" in name for name in slow)
    fast = [names[parameter] for parameter in rest["params"]]
    assert sum("pool.offset_fc" in name for name in fast) == 6
    assert sorted(fast + slow) == sorted(name for name in names.values() if "stem" not in name)
    *others, poolings = param_groups(model, 0.02, roi_offset_lr_mult=0.25)
    assert len(others) == 2 and poolings["lr"] == pytest.approx(0.005)
    assert {names[parameter] for parameter in poolings["params"]} == {name for name in fast if "offset_fc" in name}
    assert [len(group["params"]) for group in others] == [len(fast) - 6, 6]
    mmcv_pool = mmcv_ops.ModulatedDeformRoIPoolPack(3, 4, 8)
    (group,) = param_groups(mmcv_pool, 0.02, roi_offset_lr_mult=0)
    assert group["lr"] == 0 and group["params"] == list(mmcv_pool.parameters())
    for group in param_groups(model, 0.02, offset_lr_mult=0.5, weight_decay=1e-4, roi_offset_lr_mult=2):
        assert group["weight_decay"] == 1e-4
    optimiser = torch.optim.SGD(param_groups(model, 0.02), momentum=0.9, weight_decay=1e-4)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [1e-4, 1e-4]


class Align(mmcv_ops.ModulatedDeformConv2d):
    """A layer with a branch of several modules, as in EDVR and BasicVSR++."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.conv_offset = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 27, 3))


class Separate(nn.Module):
    """A branch next to the layer that uses its output."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, nn.Conv2d(8, 18, 3, padding=1))
        self.align = layer


def slow_parameters(model: nn.Module, **options) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in param_groups(model, 1.0, **options) for p in group["params"] if group["lr"] == 0.1]


@pytest.mark.parametrize(
    "name", ["conv_offset", "conv_offset_mask", "offset_conv", "conv2_offset", "offset", "offsets1"]
)
@pytest.mark.parametrize("kind", [DeformConv2d, torchvision.ops.DeformConv2d, mmcv_ops.DeformConv2d])
def test_param_groups_recognises_branches_by_name(name: str, kind: type[nn.Module]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer, prefix in ((kind(8, 8, 3), ""), (nn.ModuleDict({"dcn": kind(8, 8, 3)}), "0.")):
            model = nn.Sequential(Separate(name, layer)) if prefix else Separate(name, layer)
            assert slow_parameters(model) == [f"{prefix}{name}.weight", f"{prefix}{name}.bias"]
        assert slow_parameters(nn.Sequential(Align(), net())) == [
            f"0.conv_offset.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")
        ]


def test_param_groups_leaves_other_offsets_alone():
    """Heads of detectors predict offsets of boxes, and RoI pooling those of bins."""
    head = nn.ModuleDict({"offset_head": nn.Conv2d(8, 2, 1), "reg": nn.Conv2d(8, 2, 1)})
    pool = nn.ModuleDict({"offset_fc": nn.Sequential(nn.Linear(8, 8))})
    model = nn.ModuleDict({"body": Align(), "head": head, "pool": pool, "packed": ModulatedDeformRoIPoolPack(3, 4, 8)})
    assert all(name.startswith("body.conv_offset.") for name in slow_parameters(model))


def test_param_groups_takes_a_pattern_and_warns_without_a_branch():
    model = nn.Sequential(Separate("p_conv", DeformConv2d(8, 8, 3)), Align())
    expected = ["0.p_conv.weight", "0.p_conv.bias"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in ("*.p_conv", ["*.p_conv", "1.conv_offset"]):
            assert slow_parameters(model, pattern=pattern)[:2] == expected
        assert slow_parameters(model, offset_lr_mult=1) == []
    with pytest.warns(UserWarning, match=r"no offset branch of the deformable convolutions '0\.align'; name") as told:
        slow_parameters(model)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="in the model, so that offset_lr_mult changes nothing; name"):
        slow_parameters(net())
    with pytest.raises(ArgumentError, match=r"pattern must match .* nothing is named '\*\.q_conv'"):
        slow_parameters(model, pattern="*.q_conv")


def test_param_groups_without_branches():
    (group,) = param_groups(net(), 0.1, 1)
    assert len(group["params"]) == len(list(net().parameters()))
    for wrong, message in (
        ({"lr": -1}, "lr must not be"),
        ({"lr": 1, "offset_lr_mult": -1}, "^offset_lr_mult must not be"),
        ({"lr": 1, "roi_offset_lr_mult": -1}, "^roi_offset_lr_mult must not be"),
    ):
        with pytest.raises(ArgumentError, match=message):
            param_groups(net(), **wrong)


# rename_state_dict

RENAMINGS = {
    "mmcv": lambda key: key,
    "DCNv2 ports": lambda key: key.replace(".conv_offset.", ".conv_offset_mask."),
    "detectron2": lambda key: key.replace(".conv2.conv_offset.", ".conv2_offset."),
}


def model_of(kind: type[nn.Module]) -> nn.Module:
    model = net()
    for block in (model.first, model.second):
        block.conv2 = kind(4, 4, 3, padding=1)
    return model


KINDS = [DeformConv2dPack, ModulatedDeformConv2dPack, mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack]


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_other_libraries(kind: type[nn.Module], rename):
    source, x = excite_branches(model_of(kind)), torch.randn(2, 3, 9, 9)
    own = source.state_dict()
    checkpoint = OrderedDict((rename(key), tensor) for key, tensor in own.items())
    keys = list(checkpoint)
    target = model_of(kind)
    renamed = rename_state_dict(checkpoint, target)
    assert list(renamed) == list(own) and list(checkpoint) == keys
    target.load_state_dict(renamed)
    assert torch.equal(target(x), source(x))
    assert list(rename_state_dict(renamed, target)) == list(own)


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_checkpoint_of_a_single_layer(kind: type[nn.Module]):
    source, target = excite_branches(kind(4, 4, 3)), kind(4, 4, 3)
    checkpoint = {key.replace("conv_offset.", "conv_offset_mask."): value for key, value in source.state_dict().items()}
    target.load_state_dict(rename_state_dict(checkpoint, target))
    assert torch.equal(target.conv_offset.weight, source.conv_offset.weight)


def test_checkpoints_of_plain_convolutions():
    plain, x = net(), torch.randn(1, 3, 9, 9)
    model = net()
    convert_to_deformable(model, "*.conv2", modulated=False)
    missing, unexpected = model.load_state_dict(rename_state_dict(plain.state_dict(), model), strict=False)
    assert unexpected == [] and len(missing) == 4 and all("conv_offset" in key for key in missing)
    torch.testing.assert_close(model(x), plain(x))


def test_checkpoints_with_the_layer_of_torchvision():
    """Models that use it have a separate convolution for the offsets."""
    theirs = nn.ModuleDict({"conv2": torchvision.ops.DeformConv2d(4, 4, 3), "conv2_offset": nn.Conv2d(4, 18, 3)})
    ours = nn.ModuleDict({"conv2": DeformConv2dPack(4, 4, 3)})
    ours.load_state_dict(rename_state_dict(theirs.state_dict(), ours))
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(ours.conv2(x), theirs.conv2(x, theirs.conv2_offset(x)))
    layers = nn.ModuleDict({"conv2": DeformConv2d(4, 4, 3)})
    layers.load_state_dict(
        rename_state_dict({k: v for k, v in theirs.state_dict().items() if "offset" not in k}, layers)
    )


def test_keys_of_the_model_are_not_renamed():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = DeformConv2dPack(4, 4, 3)
            self.conv2_offset = nn.Conv2d(4, 18, 3)

    model = Model()
    state = model.state_dict()
    assert list(rename_state_dict(state, model)) == list(state)


def test_module_versions_are_kept():
    model = model_of(DeformConv2dPack)
    state = model.state_dict()
    assert rename_state_dict(state, model)._metadata == state._metadata


def test_two_names_for_one_branch_raise_an_error():
    model = model_of(DeformConv2dPack)
    state = dict(model.state_dict())
    state["first.conv2_offset.weight"] = state["first.conv2.conv_offset.weight"]
    with pytest.raises(ArgumentError, match=r"under one name, got \['first.conv2.conv_offset.weight', "):
        rename_state_dict(state, model)


def test_roi_branch_loads_from_mmcv():
    theirs, ours = mmcv_ops.DeformRoIPoolPack(3, 4, 8), DeformRoIPoolPack(3, 4, 8, sampling_ratio=0, num_fcs=3)
    with torch.no_grad():
        theirs.offset_fc[-1].weight.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    x, rois = torch.randn(1, 4, 8, 8), torch.tensor([[0, 1.0, 1.0, 6.0, 7.0]])
    torch.testing.assert_close(ours(x, rois), theirs(x, rois))
