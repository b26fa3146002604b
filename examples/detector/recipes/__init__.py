"""Complete experiments: the demo and the ablation."""

from .ablation import ABLATION_IMAGES, ABLATION_VARIANTS, run_ablation
from .demo import run_demo

__all__ = ["ABLATION_IMAGES", "ABLATION_VARIANTS", "run_ablation", "run_demo"]
