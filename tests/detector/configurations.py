"""Configurations for tests."""

from __future__ import annotations


def assignments(**sections: str) -> list[str]:
    """Expand ``network="gamma=1 max_size=64"`` to ``["network.gamma=1", "network.max_size=64"]``."""
    return [f"{section}.{item}" for section, items in sections.items() for item in items.split()]
