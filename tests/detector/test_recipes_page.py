"""The commands of docs/recipes.md are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dcnops.detector.__main__ import main
from dcnops.detector.presets import PRESETS

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
LAUNCHER = "torchrun --nproc-per-node 8 -m dcnops.detector "


def commands() -> list[list[str]]:
    """Return the arguments of each command of the page, with its variables filled in."""
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    variables = dict(match.groups() for line in lines if (match := re.fullmatch(r'(\w+)="(.*)"', line)))
    filled = (re.sub(r"\$(\w+)", lambda match: variables[match[1]], line) for line in lines if line.startswith("$"))
    return [shlex.split(line.removeprefix(LAUNCHER), comments=True) for line in filled]


def test_commands_fail_only_because_the_data_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = {"train": 0, "evaluate": 0}
    for arguments in commands():
        seen[arguments[0]] += 1
        assert main([*arguments, "--device", "cpu"]) == 2
        message = capsys.readouterr().err
        assert re.match(r"error: (coco must have annotations/|.*no such checkpoint)", message), message
    assert seen == {"train": 23, "evaluate": 2}
    assert main([text.replace("training.workers", "training.worker") for text in commands()[0]]) == 2
    assert "there is no such option" in capsys.readouterr().err  # wrong options are found before missing data


def test_every_row_of_table_1_is_trained():
    trained = [dict(zip(command[1::2], command[2::2])) for command in commands() if command[0] == "train"]
    assert len({options["--out"] for options in trained}) == len(trained)
    for detector, missing in (("faster", set()), ("mask", {"regular-roipool"})):
        assert {options["--preset"] for options in trained if options["--detector"] == detector} == set(
            PRESETS
        ) - missing
