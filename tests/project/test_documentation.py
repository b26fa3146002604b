"""Docstrings are complete, their examples run, and the prose follows the style guide."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcnops

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ("dcnops", "adapters", "examples")
CODE = (*PUBLIC, "benchmarks", "cuda", "docs", "tests")
BANNED = re.compile(r"\b(beside|anew|whose|mend(s|ed|ing)?|shall)\b", re.IGNORECASE)


@pytest.mark.parametrize(
    "module",
    [
        "dcnops.deform_aggregate",
        "dcnops.deform_conv2d",
        "dcnops.deform_roi_pool",
        "dcnops.ms_deform_attn",
        "dcnops._backends.cuda.workspace",
        "dcnops._prefetch",
    ],
)
def test_docstring_examples(module: str):
    result = doctest.testmod(importlib.import_module(f"dcnops.{module}"), raise_on_error=False)
    assert result.attempted > 0 and result.failed == 0


def test_every_public_function_documents_its_parameters_errors_and_an_example():
    functions = [getattr(dcnops, name) for name in dcnops.__all__ if inspect.isfunction(getattr(dcnops, name))]
    assert functions
    for function in functions:
        text = inspect.getdoc(function) or ""
        signature = inspect.signature(function)
        returns = signature.return_annotation not in (None, "None")
        sections = ["Parameters", "Raises", "Notes"] if signature.parameters else []
        for section in (*sections, *(["Returns"] if returns else []), "Examples"):
            assert f"\n{section}\n---" in text, f"{function.__name__} has no section {section}"
        for parameter in signature.parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{function.__name__} does not document {parameter}"


def files(folder: str, *suffixes: str) -> Iterator[Path]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes and "__pycache__" not in path.parts:
            yield path


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring, also of attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Expr(value=ast.Constant(value=str() as text)):
                yield node.lineno, text


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each string, such as a docstring or a part of an error message."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(value=str() as text):
                yield node.lineno, text


def comments(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".py":
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.string
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield number, line.partition("//")[2]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a Markdown file without code."""
    in_code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        yield number, "" if in_code else re.sub(r"`[^`]*`", "", line)


def test_docstrings_start_with_a_verb_or_a_noun():
    wrong = re.compile(r'^[ ]*"""\s*(What|Where|Whether|How|Which)\b.*', re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for folder in PUBLIC
        for path in files(folder, ".py")
        for match in wrong.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_prose_avoids_banned_words():
    texts = [
        *((path, strings) for folder in CODE if folder != "tests" for path in files(folder, ".py")),
        *((path, docstrings) for path in files("tests", ".py")),
        *((path, comments) for folder in CODE for path in files(folder, ".py", ".cu", ".cuh", ".cpp", ".h")),
        *((path, prose) for path in (*ROOT.glob("*.md"), *files("docs", ".md"), *files("benchmarks", ".md"))),
    ]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match.group()}"
        for path, parts in texts
        if BANNED.search(path.read_text(encoding="utf-8"))  # few files have to be parsed
        for line, text in parts(path)
        if (match := BANNED.search(text))
    ]
    assert not found, "\n".join(found)
