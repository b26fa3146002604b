"""Examples in docstrings and in the README are run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import dcnops

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("module", ["dcnops.deform_conv2d", "dcnops.deform_roi_pool", "dcnops._prefetch"])
def test_docstring_examples(module: str):
    result = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert result.attempted > 0 and result.failed == 0


def test_every_public_function_documents_its_parameters_errors_and_an_example():
    functions = [getattr(dcnops, name) for name in dcnops.__all__ if inspect.isfunction(getattr(dcnops, name))]
    assert functions
    for function in functions:
        text = inspect.getdoc(function) or ""
        returns = inspect.signature(function).return_annotation not in (None, "None")
        for section in ("Parameters", *(["Returns"] if returns else []), "Raises", "Notes", "Examples"):
            assert f"\n{section}\n---" in text, f"{function.__name__} has no section {section}"
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{function.__name__} does not document {parameter}"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_examples():
    """Every Python block that does not need a GPU runs, one after another in one namespace."""
    runnable = [block for block in blocks() if "cupy" not in block]
    assert runnable
    namespace: dict[str, object] = {}
    for block in runnable:
        exec(compile(block, "README.md", "exec"), namespace)
