"""Import order of the detector: a package imports only earlier ones, and only through their `__init__`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

DETECTOR = Path(__file__).parents[2] / "examples" / "detector"
LIGHT = [
    "errors",
    "json_files",
    "processes",
    "presets",
    "config",
    "spatial_support_view",
    "variants",
]  # import neither numpy nor torch
PACKAGES = ["data", "model", "predict", "engine", "recipes"]
ORDER = [*LIGHT, *PACKAGES, "api", "command_line", "command_options", "commands", "__main__", "__init__"]
FILES = [path.relative_to(DETECTOR) for path in sorted(DETECTOR.rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path):
    place = ORDER.index(path.parts[0].removesuffix(".py"))
    for node in ast.walk(ast.parse((DETECTOR / path).read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level == len(path.parts):  # from another part of the detector, at the top of the tree
            assert node.module in ORDER[:place], f"line {node.lineno}: from {'.' * node.level}{node.module}"
        else:  # from the same package
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
