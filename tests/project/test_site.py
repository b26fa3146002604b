"""The documentation site builds without a warning, and its Python blocks and those of the README run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dcnops

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    reference = (tmp_path / "reference" / "dcnops" / "index.html").read_text(encoding="utf-8")
    # Docstring sections are rendered as tables, and no raw markup is left.
    for name in dcnops.__all__:
        assert re.search(rf'<h2 id="dcnops\.([a-z_0-9]+\.)?{name}"', reference), name
    assert reference.count("<table") > 8
    assert "----" not in re.sub(r"<[^>]*>", "", reference) and "math::" not in reference
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = tmp_path if name.name == "index" else tmp_path / name
        assert (folder / "index.html").exists(), name


def test_no_placeholders_are_left() -> None:
    for page in (*PAGES, *ROOT.glob("*.md")):
        assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", page.read_text(encoding="utf-8")), page


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in one namespace; blocks that need a GPU or mmdetection are only compiled."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks or page.name != "README.md"
    for block in blocks:
        code = compile(block, str(page), "exec")
        if "cupy" not in block and "import mmdet" not in block:
            exec(code, namespace)
