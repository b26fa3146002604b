"""Faster and Mask R-CNN with deformable convolution and RoI pooling, as in Deformable ConvNets v2.

`Detector` builds, trains, evaluates and runs a detector. It is imported at its first use, as PyTorch takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .api import Detector
    from .data import CocoDataset

__all__ = ["CocoDataset", "Detector", "UserError"]


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from .api import Detector

        return Detector
    if name == "CocoDataset":
        from .data import CocoDataset

        return CocoDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
