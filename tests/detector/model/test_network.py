"""Networks: deformable and frozen layers, equality with the regular network before training, autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, roi_pool

from dcnops.adapters.torch import DeformConv2dPack, ModulatedDeformConv2dPack, param_groups
from dcnops.detector.config import Config
from dcnops.detector.model import build_detector
from dcnops.detector.model.backbones import FrozenNorm
from dcnops.detector.presets import PRESETS
from tests.detector.configurations import assignments

SMALL = assignments(network="min_size=96 max_size=128 anchor_sizes=12,24,48,64,96 neck_channels=32 head_channels=64")
DETECTORS = ["faster", "mask", "faster-fpn"]


def config(*assignments: str) -> Config:
    return Config().set([*SMALL, *assignments])


def build(*assignments: str) -> nn.Module:
    """Build a detector in float64, where rounding does not change the selection of boxes."""
    torch.manual_seed(0)
    return build_detector(config(*assignments).network, 3).double()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((96, 128), (80, 70))]


def targets() -> list[dict[str, Tensor]]:
    batch = []
    for boxes in ([[10.0, 12, 60, 70], [50, 20, 120, 90]], [[5.0, 5, 50, 60]]):
        image = images()[len(batch)]
        masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
        labels = torch.arange(1, len(boxes) + 1)
        batch.append({"boxes": torch.tensor(boxes, dtype=torch.float64), "labels": labels, "masks": masks})
    return batch


def as_regular(detector: nn.Module, regular: nn.Module) -> None:
    """Load the weights of `regular` and check that only offset branches are missing in them."""
    missing, unexpected = detector.load_state_dict(regular.state_dict(), strict=False)
    assert not unexpected
    assert all("conv_offset" in name or "offset_fc" in name for name in missing)


def outputs(detector: nn.Module) -> dict[str, Tensor]:
    """Compute the maps, the RPN's output and the heads' output for fixed boxes."""
    heads = detector.roi_heads
    with torch.inference_mode():
        batch, _ = detector.transform(images())
        maps = detector.backbone(batch.tensors)
        logits, deltas = detector.rpn.head([maps[name] for name in detector.rpn.maps])
        boxes = [torch.tensor([[3.0, 5, 60, 70], [20, 10, 110, 90]]), torch.tensor([[0.0, 0, 80, 60]])]
        boxes = [item.double() for item in boxes]
        features = heads.box_head(heads.box_roi_pool(maps, boxes, batch.image_sizes))
        scores, shifts = heads.box_predictor(features)
        found = {f"map {name}": value for name, value in maps.items()}
        found |= {f"rpn {level}": value for level, value in enumerate([*logits, *deltas])}
        found |= {"box features": features, "scores": scores, "shifts": shifts}
        if heads.has_mask():
            mask_features = heads.mask_roi_pool(maps, boxes, batch.image_sizes)
            found["masks"] = heads.mask_predictor(heads.mask_head(mask_features))
    return found


def assert_equal(detector: nn.Module, regular: nn.Module) -> None:
    ours, theirs = outputs(detector.eval()), outputs(regular.eval())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert (ours[name] - value).abs().max() <= 1e-9 * scale, name


PARTS_OF_V1 = ["dconv-c5", "dconv-c4c5", "dconv-c3c5"]  # layers of the two others


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    "preset",
    ["dcnv1", "dconv-c3c5-dpool", *(pytest.param(preset, marks=pytest.mark.exhaustive) for preset in PARTS_OF_V1)],
)
def test_v1_starts_as_the_regular_network(preset, detector):
    options = [f"network.detector={detector}", "network.backbone=small"]
    regular = build("network.preset=regular", *options)
    deformable = build(f"network.preset={preset}", "network.deform_mask_pool=true", *options)
    as_regular(deformable, regular)
    assert_equal(deformable, regular)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "backbone"), [*((detector, "small") for detector in DETECTORS), ("mask", "resnet50")]
)
def test_mask_scale_2_starts_as_the_regular_network(detector, backbone):
    options = [f"network.detector={detector}", f"network.backbone={backbone}"]
    regular = build("network.preset=regular", *options)
    deformable = build("network.preset=dcnv2", "network.roi_mask_scale=2", "network.deform_mask_pool=true", *options)
    as_regular(deformable, regular)
    assert_equal(deformable, regular)


@pytest.mark.parametrize("detector", DETECTORS)
def test_sigmoid_masks_start_as_half_the_regular_network(detector):
    """Halve the 3x3 weights in conv3 to conv5 and the pooled features of the regular network."""
    options = [f"network.detector={detector}", "network.backbone=small"]
    regular = build("network.preset=regular", *options)
    deformable = build("network.preset=dcnv2", "network.conv_mask_scale=1", *options)
    as_regular(deformable, regular)
    with torch.no_grad():
        for name, module in regular.backbone.body.named_modules():
            if getattr(module, "kernel_size", None) == (3, 3) and name[:6] in ("layer2", "layer3", "layer4"):
                module.weight *= 0.5
    regular.roi_heads.box_roi_pool.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    assert_equal(deformable, regular)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "detector"),
    [
        *(("dconv-c3c5-dpool", "faster"), ("dcnv2", "faster"), ("dcnv2", "mask")),
        pytest.param("dcnv2", "faster-fpn", marks=pytest.mark.exhaustive),
    ],
)
def test_offset_learning_rate_zero_stays_the_regular_network(preset, detector):
    options = [f"network.detector={detector}", "network.backbone=small", "network.roi_batch=16"]
    regular = build("network.preset=regular", *options)
    deformable = build(f"network.preset={preset}", "network.roi_mask_scale=2", *options)
    as_regular(deformable, regular)
    start = outputs(regular.eval())["scores"].clone()
    for network in (regular, deformable):
        groups = param_groups(network, lr=0.01, offset_lr_mult=0, roi_offset_lr_mult=0)
        optimiser = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        network.train()
        for step in range(2):
            torch.manual_seed(step)
            optimiser.zero_grad()
            sum(network(images(), targets()).values()).backward()
            optimiser.step()
    branches = {name: value for name, value in deformable.state_dict().items() if "offset" in name}
    fresh = build(f"network.preset={preset}", "network.roi_mask_scale=2", *options).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in branches.items())
    assert not torch.allclose(outputs(regular.eval())["scores"], start, rtol=1e-2)
    assert_equal(deformable, regular)


@pytest.mark.parametrize("backbone, layers", [("resnet50", 13), ("resnet101", 30), ("resnext101_32x8d", 30)])
def test_converted_layers(backbone, layers):
    with torch.device("meta"):
        detector = build(f"network.backbone={backbone}")
    converted = [name for name, module in detector.named_modules() if isinstance(module, ModulatedDeformConv2dPack)]
    assert len(converted) == layers
    assert all(name.endswith("conv2") and "layer1" not in name for name in converted)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    with torch.device("meta"):
        detector = build(f"network.preset={preset}")
    kinds = {"deformable": DeformConv2dPack, "modulated": ModulatedDeformConv2dPack}
    stages = {
        name.split(".")[1]: type(module)
        for name, module in detector.backbone.named_modules()
        if isinstance(module, (DeformConv2dPack, ModulatedDeformConv2dPack))
    }
    row = PRESETS[preset]
    assert stages == {stage: kinds[row.convolution] for stage in row.stages}  # noqa: C420
    pools = {
        "quantised": "QuantisedRoIPool",
        "aligned": "DeformRoIPool",
        "deformable": "DeformRoIPoolPack",
        "modulated": "ModulatedDeformRoIPoolPack",
    }
    assert type(detector.roi_heads.box_roi_pool.pools[0]).__name__ == pools[row.pooling]


def test_shapes_of_the_paper():
    with torch.device("meta"):
        widths = ("network.neck_channels=0", "network.head_channels=0")
        faster, mask = build(*widths), build(*widths, "network.detector=mask")
        image = torch.empty(1, 3, 800, 1333, dtype=torch.float64)
    shapes = {name: tuple(value.shape) for name, value in faster.backbone(image).items()}
    assert shapes == {"rpn": (1, 1024, 50, 84), "roi": (1, 256, 50, 84)}
    assert faster.rpn.head.cls_logits.out_channels == 15
    assert faster.roi_heads.box_head.fc6.weight.shape == (1024, 12544)
    assert faster.roi_heads.box_predictor.bbox_pred.out_features == 4 * (3 + 1)  # a box for each class
    shapes = {name: tuple(value.shape)[1:] for name, value in mask.backbone(image).items()}
    sides = {"0": (200, 334), "1": (100, 167), "2": (50, 84), "3": (25, 42), "pool": (13, 21)}
    assert shapes == {name: (256, *side) for name, side in sides.items()}
    assert mask.roi_heads.mask_roi_pool.output_size == (14, 14)


@pytest.mark.parametrize(
    "style, strides, dilations", [("torchvision", [(1, 1), (2, 2)], [1, 2, 2]), ("caffe", [(2, 2), (1, 1)], [2, 2, 2])]
)
def test_stride_placement(style, strides, dilations):
    with torch.device("meta"):
        detector = build(f"network.stride_style={style}", "network.preset=dconv-c5")
    body = detector.backbone.body
    assert [body.layer3[0].conv1.stride, body.layer3[0].conv2.stride] == strides
    assert [block.conv2.dilation[0] for block in body.layer4] == dilations
    assert [block.conv2.padding[0] for block in body.layer4] == dilations
    assert body.layer4[0].downsample[0].stride == (1, 1)


def test_frozen_layers():
    with torch.device("meta"):
        detector = build("network.detector=mask")
        conv2 = build("network.stages=c2c5").backbone
    frozen = {name.split(".")[1] for name, value in detector.backbone.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "layer1"}
    names = [name for name, value in detector.backbone.named_parameters() if value.requires_grad]
    assert not any("bn" in name or "downsample.1" in name for name in names)  # BatchNorm is constant everywhere
    thawed = build("network.backbone=small")
    assert all(value.requires_grad for value in thawed.parameters())
    names = [name for name, value in conv2.named_parameters() if value.requires_grad and "layer1" in name]
    assert len(names) == 6 and all("conv_offset" in name for name in names)  # these start at zero
    four = build("network.backbone=small", "network.frozen_stages=4").backbone
    frozen = {name.split(".")[1] for name, value in four.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2", "layer3"}


def test_options_reach_the_layers():
    options = "detector=mask backbone=small deform_groups=2 roi_mask_scale=2 gamma=1 sampling_ratio=3"
    detector = build(*assignments(network=f"{options} share_branch=false deform_mask_pool=true"))
    conv = detector.backbone.body.layer3[0].conv2
    assert (conv.conv_offset.out_channels, conv.mask_scale) == (2 * 27, 2)
    heads = detector.roi_heads
    assert len(heads.box_roi_pool.pools) == len(heads.mask_roi_pool.pools) == 4
    assert heads.box_roi_pool.pools[0].offset_fc is not heads.box_roi_pool.pools[1].offset_fc
    for pool in (*heads.box_roi_pool.pools, *heads.mask_roi_pool.pools):
        assert (pool.gamma, pool.sampling_ratio, pool.mask_scale) == (1, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_trained_parameter_has_a_gradient(detector):
    """Including a batch without objects, as data-parallel training waits for all gradients."""
    network = build(f"network.detector={detector}", "network.backbone=small", "network.share_branch=false").train()
    empty = [
        {"boxes": item["boxes"][:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": item["masks"][:0]}
        for item in targets()
    ]
    for batch in (targets(), empty):
        network.zero_grad()
        losses = network(images(), batch)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None] == []


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_autocast_keeps_boxes_exact(detector):
    network = build(f"network.detector={detector}", "network.backbone=small", "network.score_threshold=0")
    network = network.float().eval()
    pictures = [image.float() for image in images()]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        batch, _ = network.transform(pictures)
        maps = network.backbone(batch.tensors)
        assert all(value.dtype == torch.bfloat16 for value in maps.values())
        proposals, _ = network.rpn(batch, maps)
        found = network(pictures)
    for boxes in (*proposals, *(item["boxes"] for item in found)):
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())


def test_anchors_do_not_depend_on_autocast():
    generator = build("network.backbone=small", "network.min_size=800", "network.max_size=1333").rpn.anchor_generator
    batch = ImageList(torch.empty(1, 3, 800, 1344), [(800, 1333)])
    maps = torch.empty(1, 8, 50, 84)
    (exact,), (found,) = generator(batch, [maps]), generator(batch, [maps.bfloat16()])
    assert torch.equal(exact, found)
    assert exact.max() > 1333


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frozen_normalisation_is_torchvisions_in_the_dtype_it_gets(dtype):
    torch.manual_seed(0)
    ours, theirs = FrozenNorm(4), FrozenBatchNorm2d(4)
    for name, value in ours.named_buffers():
        value.copy_(torch.rand(4) + 0.5)
        getattr(theirs, name).copy_(value)
    x = torch.randn(2, 4, 3, 3).to(dtype)
    assert ours(x).dtype == dtype
    assert torch.allclose(
        ours(x).double(), theirs(x.double()), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2
    )


def test_frozen_normalisation_is_one_operation_until_the_statistics_change():
    norm, other = FrozenNorm(4), FrozenNorm(4)
    for _, value in other.named_buffers():
        value.copy_(torch.rand(4) + 0.5)
    x = torch.randn(2, 4, 3, 3)
    with torch.inference_mode():
        norm(x)
    with torch.profiler.profile() as profile:
        norm(x.requires_grad_()).sum().backward()  # with what was computed in inference mode
    assert x.grad is not None
    operations = {event.key for event in profile.key_averages()}
    assert "aten::addcmul" in operations and not {"aten::rsqrt", "aten::sub", "aten::add"} & operations
    for change in (
        lambda: norm.load_state_dict(other.state_dict()),
        lambda: norm.running_mean.add_(1),
        lambda: setattr(norm, "weight", norm.weight * 2),
        lambda: norm.double(),
    ):
        change()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        expected = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(norm(x), expected.to(norm(x).dtype))


def test_sizes_in_training_and_testing():
    transform = build("network.backbone=small").transform
    transform.train_sizes = (40, 64)
    image = torch.zeros(3, 100, 100, dtype=torch.float64)
    sizes = {tuple(transform.train().resize(image)[0].shape[1:]) for _ in range(30)}
    assert sizes == {(40, 40), (64, 64)}
    side = min(transform.min_size[0], transform.max_size)
    assert tuple(transform.eval().resize(image)[0].shape[1:]) == (side, side)


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_training_step_under_autocast(detector):
    network = build(f"network.detector={detector}", "network.backbone=small", "network.preset=dcnv2").float().train()
    batch = [{name: value.float() if name == "boxes" else value for name, value in item.items()} for item in targets()]
    pictures = [image.float() for image in images()]
    torch.manual_seed(0)
    exact = network(pictures, batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(pictures, batch)
    sum(rounded.values()).backward()
    for name, loss in exact.items():
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.1, abs=0.02), name
    assert all(value.grad.isfinite().all() for value in network.parameters() if value.grad is not None)


def test_pooling_without_half_pixels_is_torchvisions():
    options = ("network.detector=mask", "network.backbone=small", "network.preset=regular", "network.aligned=false")
    heads = build(*options, "network.sampling_ratio=0").roi_heads
    maps = {str(level): torch.randn(2, 4, 64 >> level, 48 >> level, dtype=torch.float64) for level in range(4)}
    corners = torch.rand(40, 4, dtype=torch.float64) * 190
    boxes = torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], 1).split(20)
    for pool, size in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
        expected = MultiScaleRoIAlign(list("0123"), size, 0)(maps, list(boxes), [(256, 192)] * 2)
        assert torch.allclose(pool(maps, boxes, [(256, 192)] * 2), expected, atol=1e-12)


def test_exact_anchors():
    """Compare with the formulas of mmdetection and detectron2; 800 rows give 13 rows with a distance of 64 pixels."""
    generator = build(
        "network.detector=mask", "network.backbone=small", "network.exact_anchors=true"
    ).rpn.anchor_generator
    maps = [torch.empty(1, 1, -(-800 // stride), -(-1344 // stride)) for stride in (4, 8, 16, 32, 64)]
    (found,) = generator(ImageList(torch.empty(1, 3, 800, 1344), [(800, 1333)]), maps)
    expected = []
    for level, stride, size in zip(maps, (4, 8, 16, 32, 64), (12, 24, 48, 64, 96)):
        y, x = (axis * stride for axis in torch.meshgrid(*map(torch.arange, level.shape[2:]), indexing="ij"))
        sides = [(size / ratio**0.5 / 2, size * ratio**0.5 / 2) for ratio in (0.5, 1, 2)]
        cells = [torch.stack([x - w, y - h, x + w, y + h], -1) for w, h in sides]
        expected.append(torch.stack(cells, 2).reshape(-1, 4))
    assert torch.allclose(found, torch.cat(expected), rtol=1e-6)


@pytest.mark.parametrize("size", [(70, 53), (300, 212)], ids=["enlarged", "shrunk"])
@pytest.mark.parametrize("library", ["opencv", "pillow"])
def test_resizing_like_other_libraries(library, size):
    """The same side lengths; pixels of 8 bits equal those of Pillow, or of plain bilinear interpolation, up to one."""
    transform = build("network.backbone=small", f"network.resize={library}", "network.max_size=133").transform.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    batch, _ = transform([image.double()])
    scale = min(96 / min(size), 133 / max(size))
    height, width = (int(side * scale + 0.5) for side in size)
    assert batch.image_sizes == [(height, width)] and (height, width) != tuple(int(side * scale) for side in size)
    if library == "pillow":
        expected = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    else:
        places = [
            ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1) for new, old in zip((height, width), size)
        ]
        low = [np.floor(place).astype(int) for place in places]
        high = [np.minimum(index + 1, old - 1) for index, old in zip(low, size)]
        (y, x) = (places[0] - low[0])[:, None, None], (places[1] - low[1])[:, None]
        rows = pixels[low[0]] * (1 - y) + pixels[high[0]] * y
        expected = (rows[:, low[1]] * (1 - x) + rows[:, high[1]] * x).round()
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.image_mean, transform.image_std))
    found = (batch.tensors[0, :, :height, :width] * std + mean) * 255
    assert torch.allclose(found, found.round(), atol=1e-3)
    difference = (found.permute(1, 2, 0).numpy() - expected.astype(float)).__abs__()
    assert difference.max() < 1.01 and difference.mean() < (0.3 if library == "pillow" else 0.01)


def test_quantised_pooling_is_roi_pool():
    pool = build("network.preset=regular-roipool", "network.backbone=small").roi_heads.box_roi_pool
    level = torch.randn(1, 32, 8, 8)
    boxes = torch.tensor([[3.0, 5, 60, 70], [20, 10, 110, 90]])
    pooled = pool({"roi": level}, [boxes], [(128, 128)])
    assert torch.equal(pooled, roi_pool(level, [boxes], (7, 7), 1 / 16))


def test_torchvision_weights_fit():
    with torch.device("meta"):
        body = build().backbone.body
        plain = resnet.resnet50()
    own = {name for name in body.state_dict() if "conv_offset" not in name}
    assert own == {name for name in plain.state_dict() if not name.startswith("fc.") and "num_batches" not in name}


def test_anchors_across_the_border_can_be_left_out():
    anchors = torch.tensor([[-4.0, 2, 10, 20], [0, 0, 30, 20], [20, 8, 33, 18], [40, 40, 50, 50]])
    truth = [{"boxes": torch.tensor([[0.0, 0, 30, 20]])}]
    found = {}
    for border in (-1, 0, 3, 5):
        rpn = build("network.backbone=small", f"network.rpn_border={border}").rpn
        rpn._image_sizes = [(20, 30)]
        (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], truth)
        assert matched.shape == (4, 4)
        found[border] = labels.tolist()
    # The second anchor is the object; the others overlap it too little.
    assert found[-1] == [0, 1, 0, 0]
    assert found[0] == [-1, 1, -1, -1]
    assert found[3] == [-1, 1, 0, -1]
    assert found[5] == [0, 1, 0, -1]
    rpn._image_sizes = [(5, 5)]  # no anchor is inside: all are used
    assert rpn.assign_targets_to_anchors([anchors + 100], truth)[0][0].ge(0).all()


@pytest.mark.parametrize("pooling", ["deformable", "modulated"])
def test_branches_of_roi_pooling_as_in_mmcv(pooling):
    """Three layers for the offsets and two for the masks, which start as RoIAlign and half of it."""
    options = ("network.detector=mask", "network.backbone=small", "network.pool_branch=mmcv")
    pool = build(*options, f"network.pooling={pooling}").roi_heads.box_roi_pool.pools[0].double()
    linear = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in pool.named_parameters()}
    masks = {"mask_fc.0", "mask_fc.2"} if pooling == "modulated" else set()
    assert linear == {"offset_fc.0", "offset_fc.2", "offset_fc.4"} | masks
    plain = build(*options, "network.preset=regular").roi_heads.box_roi_pool.pools[0]
    maps = torch.rand(1, 32, 12, 16, dtype=torch.double)
    regions = torch.tensor([[0.0, 1, 2, 11, 9]], dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(pool(maps, regions), plain(maps, regions) * (0.5 if masks else 1))


def test_the_term_in_frozen_batchnorm_is_an_option():
    body = build("network.norm_eps=0.25").backbone.body
    maps = torch.rand(1, 64, 4, 4)
    torch.testing.assert_close(body.bn1(maps), maps / 1.25**0.5)
