"""`mmcv_ops.install` with stand-ins for mmcv, mmengine and mmdetection; their files are named like the originals."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from dcnops.adapters.torch import mmcv_ops

FILES = {
    "mmengine/__init__.py": "",
    "mmengine/registry.py": """
class Registry(dict):
    def register_module(self, name, force, module):
        assert force
        self[name] = module
MODELS = Registry(DCN="mmcv's", DCNv2="mmcv's")
""",
    "mmcv/__init__.py": "",
    "mmcv/ops/__init__.py": """
from .carafe import carafe
from .deform_conv import DeformConv2d, DeformConv2dPack, deform_conv2d
from .deform_roi_pool import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack, deform_roi_pool
from .focal_loss import sigmoid_focal_loss
from .modulated_deform_conv import ModulatedDeformConv2d, ModulatedDeformConv2dPack, modulated_deform_conv2d
from .multi_scale_deform_attn import MultiScaleDeformableAttention
from .nms import nms
from .roi_align import RoIAlign, roi_align
from .roi_pool import roi_pool
from .saconv import SAConv2d
""",
    "mmcv/ops/carafe.py": """
from mmcv import _ext
def carafe(*args): return _ext.carafe_forward(*args)
""",
    "mmcv/ops/deform_conv.py": """
from mmcv import _ext
class DeformConv2d: pass
class DeformConv2dPack(DeformConv2d): pass
def deform_conv2d(*args): return _ext.deform_conv_forward(*args)
""",
    "mmcv/ops/deform_roi_pool.py": """
class DeformRoIPool: pass
class DeformRoIPoolPack: pass
class ModulatedDeformRoIPoolPack: pass
def deform_roi_pool(): pass
""",
    "mmcv/ops/focal_loss.py": "def sigmoid_focal_loss(): pass",
    "mmcv/ops/modulated_deform_conv.py": """
class ModulatedDeformConv2d: pass
class ModulatedDeformConv2dPack(ModulatedDeformConv2d): pass
def modulated_deform_conv2d(): pass
""",
    "mmcv/ops/multi_scale_deform_attn.py": """
class MultiScaleDeformableAttention: pass
class MultiScaleDeformableAttnFunction: pass
def multi_scale_deformable_attn_pytorch(*args): return args
""",
    "mmcv/ops/nms.py": """
import mmcv
ext_module = __import__("mmcv._ext")._ext
def nms(boxes, scores, iou_threshold, offset=0):
    return ext_module.nms(boxes, scores, iou_threshold=float(iou_threshold), offset=offset)
""",
    "mmcv/ops/roi_align.py": """
def roi_align(): pass
class RoIAlign:
    def forward(self, *args): return roi_align(*args)
""",
    "mmcv/ops/roi_pool.py": "def roi_pool(): pass",
    "mmcv/ops/saconv.py": """
from mmcv.ops.deform_conv import deform_conv2d
class SAConv2d: pass
""",
    "mmdet/__init__.py": """
import mmcv.ops.multi_scale_deform_attn
from mmcv import ops
from mmcv.ops import DeformConv2d, RoIAlign, nms
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2d
from mmcv.ops.roi_align import roi_align
""",
}
# What the compiled operations of an installation are: absent, unloadable, or working.
EXTENSIONS = {"lite": None, "broken": "raise ImportError('undefined symbol')", "full": "nms = carafe_forward = max"}
PACKAGES = ("mmcv", "mmengine", "mmdet")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mmcv_ops.ModulatedDeformConv2d, "allow_larger_offsets", False)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}
    for name in before:
        del sys.modules[name]
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_mmdetection_gets_the_replacements(packages: Path, extension: str):
    text = EXTENSIONS[extension]
    if text is not None:
        (packages / "mmcv/_ext.py").write_text(text)
    mmcv_ops.install()
    import mmdet
    from mmcv import ops
    from mmengine.registry import MODELS

    for name in mmcv_ops.__all__:
        if name != "install":
            home = ops.multi_scale_deform_attn if hasattr(ops.multi_scale_deform_attn, name) else ops
            assert getattr(home, name) is getattr(mmcv_ops, name)
    assert mmdet.DeformConv2d is mmcv_ops.DeformConv2d
    assert mmdet.ModulatedDeformConv2d is mmcv_ops.ModulatedDeformConv2d
    assert sys.modules["mmcv.ops.saconv"].deform_conv2d is mmcv_ops.deform_conv2d
    assert (MODELS["DCN"], MODELS["DCNv2"]) == (mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack)
    assert ops.MultiScaleDeformableAttention is MODELS["MultiScaleDeformableAttention"]
    replaced = [ops.roi_align.__module__, ops.roi_pool.__module__, ops.sigmoid_focal_loss.__module__]
    if extension == "full":
        assert replaced == ["mmcv.ops.roi_align", "mmcv.ops.roi_pool", "mmcv.ops.focal_loss"] and ops.carafe(1, 2) == 2
        return
    assert replaced == ["dcnops.adapters.torch.mmcv_install"] * 3 and mmdet.roi_align is ops.roi_align
    with pytest.raises(NotImplementedError, match=r"^carafe_forward is a compiled operation of mmcv that dcnops does"):
        ops.carafe(1)
    # mmengine looks for the module this way.
    assert importlib.util.find_spec("mmcv._ext").loader is not None
    original = mmcv_ops.modulated_deform_conv2d
    mmcv_ops.install(allow_larger_offsets=True)
    assert ops.DeformConv2d is mmcv_ops.DeformConv2d
    assert mmcv_ops.modulated_deform_conv2d is original
    assert ops.modulated_deform_conv2d.keywords == {"allow_larger_offsets": True}
    assert mmcv_ops.ModulatedDeformConv2d(4, 4, 3).allow_larger_offsets


def test_operations_of_torchvision(packages: Path):
    mmcv_ops.install()
    from mmcv import ops

    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [4, 0, 13, 9], [20, 20, 29, 29]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.1])
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 2, 3]
    # With their ends, boxes 1 and 2 overlap by 54 of 136 pixels; without, by 40 of 113.
    assert [ops.nms(boxes[:3], scores[:3], 0.37, offset=offset).tolist() for offset in (0, 1)] == [[1, 2], [1]]
    x, rois = torch.randn(2, 3, 12, 14, requires_grad=True), torch.tensor([[1, 2.5, 3, 20, 18.5]])
    for aligned in (True, False):
        expected = torchvision.ops.roi_align(x, rois, 3, 0.5, -1, aligned)
        assert torch.equal(ops.RoIAlign().forward(x, rois, (3, 3), 0.5, 0, "avg", aligned), expected)
    with pytest.raises(NotImplementedError, match=r"pool_mode must be 'avg' .* got 'max'"):
        ops.roi_align(x, rois, 3, pool_mode="max")
    assert torch.equal(ops.roi_pool(x, rois, 3, 0.5), torchvision.ops.roi_pool(x, rois, 3, 0.5))


def test_sigmoid_focal_loss(packages: Path):
    mmcv_ops.install()
    from mmcv import ops

    logits, target = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, 3, 1])
    one_hot = torch.nn.functional.one_hot(target, 4)[:, :3].float()
    loss = ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, "none")
    expected = torchvision.ops.sigmoid_focal_loss(logits, one_hot, 0.3, 1.5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, target, 1.5, 0.3), expected.sum() / 6)
    with pytest.raises(NotImplementedError, match="weight must be None"):
        ops.sigmoid_focal_loss(logits, target, weight=torch.ones(3))


@pytest.mark.parametrize("missing", ["mmcv", "mmengine"])
def test_missing_packages_are_named(packages: Path, missing: str):
    shutil.rmtree(packages / missing)
    with pytest.raises(ImportError, match=f"{missing} is not installed: pip install mmcv-lite mmengine"):
        mmcv_ops.install()
