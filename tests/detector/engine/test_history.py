"""History: lines of JSON without duplicates, the best evaluation."""

from __future__ import annotations

import json
import math

import pytest

from dcnops.detector.engine import Scores
from dcnops.detector.engine.history import History
from dcnops.detector.errors import UserError
from dcnops.detector.json_files import replace_text


def metrics(ap: float):
    names = [name for name in Scores.__annotations__ if not name.startswith("per_category")]
    return {"bbox": Scores(**dict.fromkeys(names, ap), per_category={}, per_category_AP50={})}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines(path):
    history = History(path, "bbox", 2)
    for done in range(1, 5):
        history.add(done, {"loss_a": float(done)}, 1 / done)
        if done % 2 == 0:
            history.record(done, metrics(math.nan) if done == 4 else None)
    first, second = lines(path)
    assert first == {"iteration": 2, "epoch": 1, "lr": 0.5, "losses": {"loss_a": 1.5}, "metrics": None}
    assert second["losses"] == {"loss_a": 3.5} and second["metrics"]["bbox"]["AP"] is None
    history.record(4, metrics(0.25))  # again
    assert [line["iteration"] for line in lines(path)] == [2, 4]
    assert lines(path)[1]["metrics"]["bbox"]["AP"] == 0.25


def test_resuming_in_the_middle_of_an_epoch(path):
    history = History(path, "bbox", 2)
    states = {}
    for done in range(1, 7):
        history.add(done, {"loss_a": done / 3}, 0.1)
        states[done] = json.loads(json.dumps(history.state()))
        if done % 2 == 0:
            history.record(done, metrics(done / 10))
    expected = path.read_bytes()
    other = History(path, "bbox", 2)
    other.restore(states[3], 3)  # the later epochs are forgotten
    assert [line["iteration"] for line in lines(path)] == [2]
    for done in range(4, 7):
        other.add(done, {"loss_a": done / 3}, 0.1)
        if done % 2 == 0:
            other.record(done, metrics(done / 10))
    assert path.read_bytes() == expected


def test_the_best_evaluation(path):
    history = History(path, "bbox", 1)
    assert history.improved(metrics(0.0)) and not history.improved(metrics(math.nan))
    for done, (ap, improves, since) in enumerate(
        [(0.3, True, 0), (None, None, 0), (0.3, False, 1), (math.nan, False, 2), (0.4, True, 0), (0.1, False, 1)], 1
    ):
        if ap is not None:
            assert history.improved(metrics(ap)) == improves
        history.record(done, None if ap is None else metrics(ap))
        assert history.without_improvement() == since
    assert history.best() == (0.4, 5)


@pytest.mark.parametrize("line", ["{", "[]", '{"iteration": 1}', '{"iteration": "1", "epoch": 1, "metrics": null}'])
def test_a_damaged_file(path, line):
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"history\.jsonl: line 1 is not one of this program"):
        History(path, "bbox", 1).restore({"sums": {}, "count": 0, "lr": 0.0}, 1)


def test_a_full_disk_keeps_the_old_lines(path, monkeypatch):
    history = History(path, "bbox", 1)
    history.record(1, None)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcnops.detector.json_files.os.replace", full)
    with pytest.raises(UserError, match=r"history\.jsonl: cannot be written \(disk full: No space left on device\)$"):
        history.record(2, None)
    with pytest.raises(OSError, match="No space") as caught:
        replace_text(path, "text")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
