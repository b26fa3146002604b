"""Complete experiments: the demo and the ablation."""

from .ablation import run_ablation
from .demo import run_demo

__all__ = ["run_ablation", "run_demo"]
