"""Backbones: ResNets with the deformable layers of a preset, and their neck."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dcnops.adapters.torch import convert_to_deformable

from ..config import NetworkConfig

PYRAMID = ("0", "1", "2", "3")  # levels for RoI pooling, strides 4 to 32
STAGES = ("layer1", "layer2", "layer3", "layer4")


class FrozenNorm(FrozenBatchNorm2d):
    """Frozen BatchNorm that keeps the dtype of its input; torchvision's returns float32 for 16-bit maps."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class SmallResNet(resnet.ResNet):
    """ResNet with a quarter of the width and two blocks per stage, which learns from scratch on a CPU."""

    def __init__(self, replace_stride_with_dilation: list[bool]) -> None:
        super().__init__(
            resnet.Bottleneck,
            [2, 2, 2, 2],
            norm_layer=lambda channels: nn.GroupNorm(channels // 8, channels),
            replace_stride_with_dilation=replace_stride_with_dilation,
        )

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **kwargs)


class DilatedBackbone(nn.Module):
    """ResNet with conv4 for the RPN, and conv5 at stride 16 with a 1x1 convolution for the RoIs."""

    rpn_maps = ("rpn",)
    roi_maps = ("roi",)

    def __init__(self, body: resnet.ResNet, out_channels: int) -> None:
        super().__init__()
        self.rpn_channels = _channels(body.layer3)
        self.out_channels = out_channels
        self.body = IntermediateLayerGetter(body, {"layer3": "rpn", "layer4": "roi"})
        reduction = nn.Conv2d(_channels(body.layer4), out_channels, 1)
        nn.init.kaiming_uniform_(reduction.weight, a=1)
        nn.init.zeros_(reduction.bias)  # type: ignore[arg-type]
        self.neck = nn.Sequential(reduction, nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [N, 3, H, W] to "rpn" [N, rpn_channels, H/16, W/16] and "roi" [N, out_channels, H/16, W/16]."""
        maps = self.body(images)
        return OrderedDict(rpn=maps["rpn"], roi=self.neck(maps["roi"]))


class PyramidBackbone(nn.Module):
    """Feature pyramid of conv2 to conv5, with one more level for the RPN."""

    rpn_maps = (*PYRAMID, "pool")
    roi_maps = PYRAMID

    def __init__(self, body: resnet.ResNet, out_channels: int) -> None:
        super().__init__()
        stages = [getattr(body, name) for name in STAGES]
        self.rpn_channels = self.out_channels = out_channels
        self.body = IntermediateLayerGetter(body, dict(zip(STAGES, PYRAMID)))
        self.fpn = FeaturePyramidNetwork([_channels(stage) for stage in stages], out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [N, 3, H, W] to "0" to "3" and "pool" [N, out_channels, H/s, W/s], s = 4, 8, 16, 32, 64."""
        pyramid: dict[str, Tensor] = self.fpn(self.body(images))
        return pyramid


def build_backbone(network: NetworkConfig) -> DilatedBackbone | PyramidBackbone:
    """Build a backbone with random weights and frozen stages from a resolved configuration."""
    dilated = not network.has_pyramid
    body = _resnet(network, [False, False, dilated])
    if network.stride_style == "caffe":
        _stride_in_first_convolution(body, dilated)
    layers = network.layers
    if layers.stages:
        convert_to_deformable(
            body,
            lambda name, conv: name.split(".")[0] in layers.stages and conv.kernel_size == (3, 3),
            modulated=layers.convolution == "modulated",
            deform_groups=network.deform_groups,
            mask_scale=network.conv_mask_scale,
        )
    for stage in [["conv1", "bn1"], *([stage] for stage in STAGES)][: network.frozen_stages]:
        for name in stage:
            for parameter_name, parameter in getattr(body, name).named_parameters():
                parameter.requires_grad_("conv_offset" in parameter_name)
    build: Callable[..., DilatedBackbone | PyramidBackbone] = DilatedBackbone if dilated else PyramidBackbone
    return build(body, network.neck_channels)


def _resnet(network: NetworkConfig, replace_stride_with_dilation: list[bool]) -> resnet.ResNet:
    if network.backbone == "small":
        return SmallResNet(replace_stride_with_dilation)
    options: dict[str, Any] = {
        "norm_layer": partial(FrozenNorm, eps=network.norm_eps),
        "replace_stride_with_dilation": replace_stride_with_dilation,
    }
    if network.backbone == "resnext101_32x4d":  # torchvision has no weights for it and no function
        return resnet.ResNet(resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, **options)
    body: resnet.ResNet = getattr(resnet, network.backbone)(**options)
    return body


def _stride_in_first_convolution(body: resnet.ResNet, dilated: bool) -> None:
    """Move strides as in Caffe's ResNets: into the first 1x1 convolution of a stage, with dilation in every 3x3."""
    for stage in (body.layer2, body.layer3, body.layer4):
        first = stage[0]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
    if dilated:
        body.layer4[0].conv2.dilation = body.layer4[0].conv2.padding = (2, 2)


def _channels(stage: Any) -> int:
    channels: int = stage[-1].conv3.out_channels
    return channels
