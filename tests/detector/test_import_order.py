"""The order of the packages: each imports only from the ones before it, and other packages only through their face."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

DETECTOR = Path(__file__).parents[2] / "examples" / "detector"
ORDER = ["errors", "presets", "config", "data", "model", "predict", "engine", "recipes", "__main__"]
FILES = [path.relative_to(DETECTOR) for path in sorted(DETECTOR.rglob("*.py")) if path.parent.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    place = ORDER.index(path.with_suffix("").parts[0]) if path.name != "__init__.py" or path.parent.name else 0
    for node in ast.walk(ast.parse((DETECTOR / path).read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level == len(path.parts):  # from another part of the detector, at the top of the tree
            assert node.module in ORDER[:place], f"line {node.lineno}: from {'.' * node.level}{node.module}"
        else:  # from the same package
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
