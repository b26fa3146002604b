"""Variants of an ablation: a preset with the regions to mimic."""

from __future__ import annotations

from typing import NamedTuple

from .config import Config
from .errors import UserError
from .presets import PRESETS

ABLATION_IMAGES = (400, 200)  # synthetic images to train on and to evaluate on
ABLATION_VARIANTS = ("regular", "dcnv1", "dcnv2", "dcnv2-mimic")  # in the paper's order of accuracy


class Variant(NamedTuple):
    """Preset with the regions to mimic, one row of the table."""

    preset: str
    mimic: str | None  # fg, bg, all or none; None for the preset's default

    @property
    def name(self) -> str:
        return self.preset if self.mimic is None else f"{self.preset}:{self.mimic}"

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-mimics-")

    @staticmethod
    def parse(text: str) -> Variant:
        """Parse ``PRESET`` or ``PRESET:MIMIC``."""
        preset, colon, mimic = text.partition(":")
        if preset not in PRESETS:
            raise UserError(f"a variant must be one of {', '.join(PRESETS)}, or one with a colon, got {text!r}")
        if colon and mimic not in ("fg", "bg", "all", "none"):
            raise UserError(f"after the colon of a variant stands fg, bg, all or none, got {text!r}")
        return Variant(preset, mimic if colon else None)

    def configure(self, config: Config, seed: int = 0) -> Config:
        """Return the configuration of a run."""
        mimicking = [] if self.mimic is None else [f"mimicking.regions={self.mimic}"]
        return config.set([f"network.preset={self.preset}", f"training.seed={seed}", *mimicking])

    @property
    def regions(self) -> str:
        """Regions that are mimicked; empty without mimicking."""
        mimicking = self.configure(Config()).mimics()
        return mimicking.regions if mimicking else ""
