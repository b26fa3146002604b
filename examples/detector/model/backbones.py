"""Backbones: ResNets with the deformable layers of a preset, and their neck."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
    """Frozen BatchNorm in one pass that keeps the dtype of its input; torchvision's returns float32 for 16-bit maps."""

    # Statistics with their versions, dtype, and the scale and shift for them.
    _cached: tuple[list[Tensor], list[int], torch.dtype, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(x.dtype)
        return torch.addcmul(shift, x, scale)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factor and the summand [C, 1, 1]; those of the last call if the statistics have not changed."""
        statistics = [self.weight, self.bias, self.running_mean, self.running_var]
        if torch.compiler.is_compiling():
            return self._compute(dtype)
        versions = [0 if item.is_inference() else item._version for item in statistics]
        if self._cached is not None:
            known, known_versions, known_dtype, scale, shift = self._cached
            if known_dtype == dtype and known_versions == versions and all(map(operator.is_, known, statistics)):
                return scale, shift
        with torch.inference_mode(False):  # training can use what was computed in inference mode
            scale, shift = self._compute(dtype)
        # Results of a recorded graph are wrong outside of it. Those of a fake mode are a subclass of Tensor.
        recorded = torch._C._get_tracing_state() or (scale.is_cuda and torch.cuda.is_current_stream_capturing())
        if type(scale) is Tensor and not recorded:
            self._cached = statistics, versions, dtype, scale, shift
        return scale, shift

    def _compute(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]


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
