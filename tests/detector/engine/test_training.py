"""Training: learning rates, exact steps, whole runs, interruptions, several processes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

from dcnops.detector.config import Config
from dcnops.detector.data import AspectRatioBatches, Batch, CocoDataset, find_data, load_batches, write_synthetic
from dcnops.detector.engine import BEST, CHECKPOINT, MODEL, Interrupted, Trainer, detect, train, training
from dcnops.detector.engine import progress as progress_module
from dcnops.detector.engine import trainer as trainer_module
from dcnops.detector.engine.interruption import StopRequests
from dcnops.detector.engine.progress import Progress
from dcnops.detector.engine.trainer import MOST_SKIPPED, build_trainer, learning_rate_factor
from dcnops.detector.engine.training import HISTORY
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector, load_checkpoint, load_detector
from tests.detector.configurations import assignments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
# Nine images, wide and tall: five iterations an epoch, one of them with a repeated image.
SIZES = [(64, 48), (48, 64), (64, 40), (50, 50), (40, 64), (64, 64), (56, 48), (40, 56), (64, 56)]
TINY = Config().set(
    assignments(
        network="backbone=small min_size=48 max_size=64 anchor_sizes=12,24,40 neck_channels=16 head_channels=32 "
        "rpn_batch=32 rpn_candidates_train=100 rpn_candidates_test=50 proposals_train=40 proposals_test=20 "
        "roi_batch=16",
        training="epochs=2 lr_batch=2 lr=0.02 lr_steps=1.5 warmup_iterations=3 workers=0 save_every=3 evaluate_every=0",
    )
)
# Enough detections to compare their order.
EVALUATED = ["network.score_threshold=0", "network.max_detections=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noisy images, each with a bright or a dark rectangle."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index, (width, height) in enumerate(SIZES):
        pixels = random.integers(90, 150, (height, width, 3), np.uint8)
        x, y, w, h = random.integers((2, 2, 16, 12), (14, 14, 28, 24))
        pixels[y : y + h, x : x + w] += np.array(100 if index % 2 else 160, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        box = [int(value) for value in (x, y, w, h)]
        annotations.append({"id": 1 + index, "image_id": index, "category_id": 1 + index % 2, "bbox": box})
    categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder


def dataset(folder: Path, *, evaluated: bool = False) -> CocoDataset:
    return CocoDataset(*find_data(folder, "train"), masks=False, keep_empty=evaluated)


def build(config: Config = TINY, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_detector(config.network, 2)


def run(out: Path, data: Path, *assignments: str, resume: Any = False, evaluate: bool = False):
    config = TINY.set(assignments)
    images = dataset(data)
    # A resumed run must not depend on the model and the random state at its start.
    model = build(config, seed=9 if (out / CHECKPOINT).exists() else 0)
    val_set = dataset(data, evaluated=True) if evaluate else None
    return train(model, config, images, val_set, out, CPU, resume=resume)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "nested" / "by train"
    run(out, data)
    return out


def assert_equal(a: object, b: object, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(out: Path, reference: Path, *different: str) -> None:
    """Compare the files of two runs bit by bit, except for the `different` training options."""
    for name in (MODEL, CHECKPOINT):
        contents = [load_checkpoint(folder / name) for folder in (out, reference)]
        for content in contents:
            for option in different:
                del content["config"]["training"][option]
        assert_equal(*contents)


def assert_same_detections(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare detections of two processes or models. The last digits depend on the instructions that torch chooses."""
    kinds = [[(one["image_id"], one["category_id"]) for one in detections] for detections in (found, expected)]
    assert kinds[0] == kinds[1]
    for one, other in zip(found, expected):
        assert one.keys() == other.keys() == {"image_id", "category_id", "bbox", "score"}
        assert one["bbox"] == pytest.approx(other["bbox"], rel=1e-4, abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)


def stop_at(monkeypatch: pytest.MonkeyPatch, *iterations: int, number: int = signal.SIGTERM) -> None:
    """Send the process a signal in the given iterations, counted from 1."""
    step = Trainer.step

    def interrupted(self: Trainer, batch: Batch, iteration: int, *rest: Any):
        if iteration + 2 in iterations:  # this iteration has already read its flag
            signal.raise_signal(number)
        return step(self, batch, iteration, *rest)

    monkeypatch.setattr(Trainer, "step", interrupted)


# The learning rate


def test_schedule():
    options = Config().set(["training.warmup_iterations=4", "training.lr_steps=2,3.5"]).training
    factors = [learning_rate_factor(options, iteration, 10) for iteration in range(40)]
    assert factors[:5] == pytest.approx([1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
    assert factors[5:20] == [1] * 15
    assert factors[20:35] == pytest.approx([0.1] * 15) and factors[35:] == pytest.approx([0.01] * 5)
    # A warm-up longer than the first step, then none.
    options = Config().set(["training.warmup_iterations=4", "training.lr_steps=1", "training.warmup_factor=0"]).training
    assert [learning_rate_factor(options, i, 2) for i in range(5)] == pytest.approx([0, 0.25, 0.05, 0.075, 0.1])
    options = Config().set(["training.warmup_iterations=0", "training.lr_steps="]).training
    assert {learning_rate_factor(options, i, 2) for i in range(9)} == {1}


def test_learning_rates_of_the_parameters(data):
    assignments = ["training.lr=0.08", "training.lr_batch=16", "training.roi_offset_lr_mult=0.5"]
    trainer = Trainer(build(), TINY.set(assignments).resolve_training(), CPU, 5)
    images = dataset(data)
    step = trainer.step(next(load_batches(images, batches(images), TINY, CPU)), 6)
    base = 0.08 * 2 / 16
    assert step.lr == pytest.approx(base)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for group, factor, pattern in zip(trainer.optimizer.param_groups, (1, 0.1, 0.5), ("", "conv_offset", "offset_fc")):
        assert group["lr"] == pytest.approx(base * factor)
        assert group["weight_decay"] == 1e-4 and group["momentum"] == 0.9
        assert group["params"] and all(pattern in names[parameter] for parameter in group["params"])


def batches(images: CocoDataset) -> AspectRatioBatches:
    return AspectRatioBatches(images.sizes, 2, seed=0, group=True)


# Exact numbers, with a network of one layer


class Line(nn.Module):
    """Losses linear in the parameters, with the values of the images as gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)

    def forward(self, images, targets):
        values = self.layer(torch.stack([image.mean((1, 2)) for image in images]))
        return {"loss_a": values.mean(), "loss_b": (2 * values.float() + torch.rand(())).mean()}


def line_batch(value: float) -> Batch:
    return Batch([0, 1], [torch.full((3, 4, 4), value)] * 2, [{}, {}])


def line_trainer(*assignments: str) -> Trainer:
    torch.manual_seed(0)
    options = TINY.set(["training.warmup_iterations=0", "training.lr=0.5", *assignments]).resolve_training()
    return Trainer(Line(), options, CPU, 100)


def test_the_gradient_is_clipped():
    for norm, expected in (("0", 3.0 * 2), ("50", 3.0 * 2), ("1.5", 1.5 / 3**0.5)):
        trainer = line_trainer(f"training.clip_norm={norm}", "training.weight_decay=0")
        before = trainer.model.layer.weight.detach().clone()
        step = trainer.step(line_batch(2.0), 0)
        assert step.gradient_norm == pytest.approx(6 * 3**0.5)
        torch.testing.assert_close(before - trainer.model.layer.weight, torch.full((1, 3), 0.5 * expected))


def test_adamw():
    """The first step changes each parameter by the learning rate."""
    trainer = line_trainer("training.optimizer=adamw", "training.momentum=0.8", "training.weight_decay=0")
    assert trainer.optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    before = trainer.model.layer.weight.detach().clone()
    trainer.step(line_batch(2.0), 0)
    torch.testing.assert_close(before - trainer.model.layer.weight, torch.full((1, 3), trainer.lr))


def test_random_numbers_are_a_function_of_the_seed_and_the_iteration():
    def loss(iteration: int, *assignments: str) -> float:
        trainer = line_trainer(*assignments)
        torch.manual_seed(99 + iteration)
        return trainer.step(line_batch(0.0), iteration).losses["loss_b"]

    assert loss(3) == loss(3)
    assert len({loss(3), loss(4), loss(3, "training.seed=1")}) == 3


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_autocast(amp):
    trainer = line_trainer(f"training.amp={amp}")
    kinds = []
    trainer.model.layer.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    weights = [trainer.model.layer.weight.detach().clone()]
    for iteration in range(3):
        trainer.step(line_batch(1.0), iteration)
        weights.append(trainer.model.layer.weight.detach().clone())
    assert set(kinds) == {getattr(torch, amp)}
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert not torch.equal(weights[-1], weights[0])


def test_float16_overflow_skips_the_step_and_lowers_the_scale():
    trainer = line_trainer("training.amp=float16")
    before, scale = trainer.model.layer.weight.detach().clone(), trainer.scaler.get_scale()
    # In float16 the gradient of the layer's weight is 65536 * 30 / 2: it overflows, the loss does not.
    step = trainer.step(line_batch(30.0), 0)
    assert not step.not_finite and not np.isfinite(step.gradient_norm)
    assert torch.equal(trainer.model.layer.weight, before) and trainer.scaler.get_scale() == scale / 2

    other = line_trainer("training.amp=float16")
    other.load_state(trainer.state())
    assert other.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("amp", ["none", "float16", "bfloat16"])
def test_a_loss_that_is_not_finite_changes_nothing(amp):
    trainer = line_trainer(f"training.amp={amp}")
    trainer.step(line_batch(1.0), 0)
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    step = trainer.step(line_batch(float("nan")), 1)
    assert step.not_finite and all(map(np.isnan, step.losses.values()))
    assert_equal(dict(trainer.model.state_dict()), state)


def test_a_gradient_that_is_not_finite_changes_nothing():
    trainer = line_trainer()
    before = trainer.model.layer.weight.detach().clone()
    trainer.model.layer.weight.register_hook(lambda gradient: gradient / 0)
    step = trainer.step(line_batch(1.0), 0)
    assert step.not_finite and np.isfinite(list(step.losses.values())).all()
    assert torch.equal(trainer.model.layer.weight, before)


def test_endless_float16_overflow_stops_the_run():
    trainer = line_trainer("training.amp=float16")
    trainer.model.layer.weight.register_hook(lambda gradient: gradient / 0)
    stopped = [trainer.step(line_batch(1.0), number).not_finite for number in range(MOST_SKIPPED + 1)]
    assert stopped == [False] * MOST_SKIPPED + [True]


# Whole runs


def test_overfitting_two_images(tmp_path, monkeypatch):
    # An epoch is one iteration: saving after each would take a third of the time.
    save = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda path, *rest: path.name == MODEL and save(path, *rest))
    write_synthetic(tmp_path / "data", train=2, val=0, size=64, deformation=0.3, seed=0)
    images = dataset(tmp_path / "data")
    config = TINY.set(
        assignments(
            network="min_size=64 roi_mask_scale=2 box_loss_beta=0.11 neck_channels=32 head_channels=64 rpn_batch=64 "
            "rpn_candidates_train=200 rpn_candidates_test=200 proposals_train=100 proposals_test=50 roi_batch=32",
            training="epochs=80 lr_steps=60,72 optimizer=adamw lr=0.003 lr_batch=2 batch_size=2 warmup_iterations=20 "
            "clip_norm=10 flip=0 save_every=1000",
        )
    )
    torch.manual_seed(0)
    model = build_detector(config.network, len(images.categories))
    metrics = train(model, config, images, dataset(tmp_path / "data", evaluated=True), tmp_path / "out", CPU)
    assert metrics["bbox"].AP > 0.5
    # The saved model gives the same numbers.
    loaded, _, categories = load_detector(tmp_path / "out" / MODEL, CPU)
    assert categories == images.categories
    assert_same_detections(*(detect(network, images, CPU, progress=False) for network in (loaded, model)))
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["bbox"]["AP"] == pytest.approx(metrics["bbox"].AP)


def test_files_of_a_run(uninterrupted):
    model, checkpoint = load_checkpoint(uninterrupted / MODEL), load_checkpoint(uninterrupted / CHECKPOINT)
    assert model["iteration"] == checkpoint["iteration"] == 10
    assert not {"optimizer", "scaler"} & set(model) and {"optimizer", "scaler"} <= set(checkpoint)
    assert_equal(model["model"], checkpoint["model"])
    assert not list(uninterrupted.glob(".*"))


def test_resuming_gives_the_uninterrupted_run(uninterrupted, data, tmp_path, monkeypatch):
    """Interrupt both epochs in the middle, with different numbers of data-loading processes."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 7)
        for done, resume, workers in ((2, False, 2), (7, True, 0)):
            with pytest.raises(Interrupted, match=f"after iteration {done} of 10, .*--resume"):
                run(tmp_path, data, f"training.workers={workers}", resume=resume)
            assert load_checkpoint(tmp_path / CHECKPOINT)["iteration"] == done
            assert not (tmp_path / MODEL).exists()
    run(tmp_path, data, "training.workers=1", "training.save_every=4", resume=True)
    assert_same_run(tmp_path, uninterrupted, "workers", "save_every")
    # A finished run has nothing left to do, unless it gets more epochs.
    run(tmp_path, data, resume=True)
    assert_same_run(tmp_path, uninterrupted, "workers", "save_every")
    run(tmp_path, data, "training.epochs=3", "training.lr_steps=2", "network.max_detections=5", resume=True)
    assert load_checkpoint(tmp_path / MODEL)["iteration"] == 15
    history = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line["iteration"] for line in history] == [5, 10, 15]
    # The milestone 1.5 has been replaced by 2.
    assert [line["lr"] for line in history] == pytest.approx([0.02, 0.002, 0.002])


EVERYTHING = assignments(
    training="batch_size=1 accumulate=2 ema=0.9 min_sizes=40,48,56 scale_jitter=0.5,2 color_jitter=0.4 bias_lr_mult=2 "
    "bias_weight_decay=0 evaluate_every=1",
    network="score_threshold=0 max_detections=10",
)


def test_resuming_with_all_options_that_have_a_state(data, tmp_path, monkeypatch):
    """One command starts and continues; a run that is stopped in an evaluation repeats it."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    run(reference, data, *EVERYTHING, "training.workers=1", evaluate=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(out, data, *EVERYTHING, resume="auto", evaluate=True)
    with monkeypatch.context() as patch:
        patch.setattr(training, "coco_metrics", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out, data, *EVERYTHING, resume="auto", evaluate=True)
    assert load_checkpoint(out / CHECKPOINT)["iteration"] == 5 and not (out / BEST).exists()
    run(out, data, *EVERYTHING, resume="auto", evaluate=True)
    assert_same_run(out, reference, "workers")
    assert (out / HISTORY).read_bytes() == (reference / HISTORY).read_bytes()
    assert len((out / HISTORY).read_text().splitlines()) == 2
    assert_equal(*(load_checkpoint(folder / BEST)["model"] for folder in (out, reference)))
    # The averages are in all files, the parameters for going on only in one.
    content = load_checkpoint(out / CHECKPOINT)
    assert_equal(content["model"], load_checkpoint(out / MODEL)["model"])
    assert any(not torch.equal(value, content["model"][name]) for name, value in content["trained"].items())
    assert Config.from_dict(json.loads((out / "config.json").read_text())) == TINY.set(EVERYTHING)


def test_early_stopping_and_the_best_model(data, tmp_path, monkeypatch, capsys):
    precisions = iter([0.2, 0.5, 0.5, 0.3, 0.1])
    metrics = training.coco_metrics

    def evaluated(*rest: Any) -> Any:
        (scores,) = metrics(*rest).values()
        return {"bbox": dataclasses.replace(scores, AP=next(precisions))}

    monkeypatch.setattr(training, "coco_metrics", evaluated)
    options = ["training.epochs=9", "training.evaluate_every=1", "training.patience=2", *EVALUATED]
    last = run(tmp_path, data, *options, evaluate=True)
    assert last["bbox"].AP == 0.3
    assert [load_checkpoint(tmp_path / name)["iteration"] for name in (MODEL, CHECKPOINT, BEST)] == [20, 20, 10]
    assert "the box AP has been best after epoch 2 (0.500), 2 evaluations ago" in capsys.readouterr().out
    # It stays stopped, until the patience grows.
    run(tmp_path, data, *options, resume=True, evaluate=True)
    assert [load_checkpoint(tmp_path / name)["iteration"] for name in (MODEL, BEST)] == [20, 10]
    with pytest.raises(UserError, match=r"training\.patience=2 needs validation data"):
        run(tmp_path / "other", data, *options)


@pytest.mark.parametrize("failing", ["thread", "close"])
def test_a_full_disk_while_tensorboard_writes(data, tmp_path, monkeypatch, capfd, failing):
    def full(*arguments: object) -> None:
        # As from write(2), without a file name.
        if failing == "close" or (tmp_path / CHECKPOINT).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    hook = threading.excepthook
    name = "close" if failing == "close" else "write"
    original = getattr(RecordWriter, name)
    monkeypatch.setattr(RecordWriter, name, full)
    monkeypatch.setattr(progress_module, "LOG_EVERY", 1)
    with pytest.raises(UserError, match=r"tensorboard: cannot be written \(disk full: No space left on device\)$"):
        run(tmp_path, data, "training.log_offsets_every=1")
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is hook
    load_checkpoint(tmp_path / CHECKPOINT)


def test_a_killed_run_loses_at_most_one_interval(data, tmp_path, monkeypatch):
    """A copy of the folder, made in an iteration, is what a process that is killed there leaves behind."""
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    monkeypatch.setattr(progress_module, "LOG_EVERY", 1)
    step = Trainer.step

    def copied(self: Trainer, batch: Batch, iteration: int, *rest: Any):
        if iteration == 8:
            shutil.copytree(reference, killed)
        return step(self, batch, iteration, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", copied)
        run(reference, data)
    # Saved every third iteration and at the end of the first epoch, the fifth.
    assert load_checkpoint(killed / CHECKPOINT)["iteration"] == 6
    assert not (killed / MODEL).exists()
    run(killed, data, resume=True)
    assert_same_run(killed, reference)

    events = EventAccumulator(str(tmp_path / "killed" / "tensorboard")).Reload()
    assert {"train/loss", "train/loss_classifier", "train/lr", "train/seconds_per_iteration"} <= set(
        events.Tags()["scalars"]
    )
    # Iterations 7 and 8 were logged twice; only the resumed ones count.
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(data, tmp_path, monkeypatch, number, code):
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    stop_at(monkeypatch, 4, number=number)
    with pytest.raises(Interrupted) as raised:
        run(tmp_path, data, "training.save_every=100")
    assert raised.value.exit_code == code
    assert load_checkpoint(tmp_path / CHECKPOINT)["iteration"] == 4
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signals_of_clusters_and_terminals():
    numbers = [signal.SIGUSR1, signal.SIGHUP]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        for number in numbers:
            with StopRequests("stopped") as requests:
                signal.raise_signal(number)
                assert requests.received == number
            assert line_trainer().step(line_batch(1.0), 0, stop=number).stop == number
        # Under nohup, and in the background of a shell without job control.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequests("stopped") as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_a_second_signal_stops_at_once(monkeypatch, capfd):
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("dcnops.detector.engine.interruption.time", clock)
    now = 0.0
    with StopRequests("stopped") as requests:
        signal.raise_signal(signal.SIGINT)
        assert requests.received == signal.SIGINT
        assert "once more to stop at once" in capfd.readouterr().err
        now = 0.2  # a launcher forwards the same signal
        signal.raise_signal(signal.SIGINT)
        now = 2.0
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    with StopRequests("stopped") as requests:
        with pytest.raises(Interrupted), requests.at_once():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), requests.at_once():
            pytest.fail("the stored signal must raise")


def test_ctrl_c_at_a_terminal(data, tmp_path):
    """The signal reaches all processes, including those for data loading."""
    assignments = [
        f"{section}.{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for section, values in TINY.to_dict().items()
        for name, value in values.items()
        if f"{section}.{name}" not in ("training.epochs", "training.workers")
    ]
    command = [sys.executable, "-m", "dcnops.detector", "train", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--train-annotations", str(find_data(data, "train")[0]), "--train-images", str(data / "images")]
    command += ["--set", *assignments, "training.epochs=1000", "training.workers=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    done = load_checkpoint(tmp_path / "out" / CHECKPOINT)["iteration"]
    assert re.search(rf"stopped after iteration {done} of 5000, .*--resume", errors)
    assert "Traceback" not in errors


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(data, tmp_path, monkeypatch, poisoned):
    images = dataset(data)
    indices = batches(images).epoch(1)[1]  # of iteration 7
    step = Trainer.step

    def poison(self: Trainer, batch: Batch, iteration: int, *rest: Any):
        if iteration == 6 and poisoned == "loss":
            batch.images[0][:] = float("nan")
        elif iteration == 6:
            self.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
        return step(self, batch, iteration, *rest)

    monkeypatch.setattr(Trainer, "step", poison)
    with pytest.raises(UserError) as raised:
        run(tmp_path, data)
    message = str(raised.value)
    assert message.startswith(f"iteration 7: the {poisoned} is not finite (loss_classifier ") and "\n" not in message
    for index in indices:
        assert str(images.path(index)) in message
    assert load_checkpoint(tmp_path / CHECKPOINT)["iteration"] == 6 and not (tmp_path / MODEL).exists()


def test_evaluations(data, tmp_path, capsys):
    metrics = run(tmp_path, data, "training.epochs=3", "training.evaluate_every=2", *EVALUATED, evaluate=True)
    output = capsys.readouterr()
    assert output.out.count("AP by category") == 2 and "9 images, 3 epochs of 5 iterations with 2 images" in output.out
    assert "the learning rate rises" not in output.out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("bbox/AP")] == [10, 15]
    assert events.Scalars("bbox/AP")[-1].value == pytest.approx(metrics["bbox"].AP)
    assert json.loads((tmp_path / "metrics.json").read_text())["bbox"]["AP50"] == pytest.approx(metrics["bbox"].AP50)
    # Without a terminal the progress is a line of text.
    (line,) = re.findall(r"^iteration 15/15.*$", output.err, re.MULTILINE)
    for part in (r"epoch 3/3", r"loss \d+\.\d+ \(classifier \d", r"lr 0\.002,", r"s/iteration", "ETA 0:00:00", "MiB"):
        assert re.search(part, line), line


def test_images_without_objects_are_negative_examples(data):
    """A batch of nothing else has a loss, for masks and mimicking too."""
    config = TINY.set(assignments(network="preset=dcnv2-mimic detector=mask anchor_sizes=8,12,24,40,60"))
    config = config.set(assignments(mimicking="crop=32 boxes=2"))
    images = dataset(data)
    trainer = build_trainer(build(config), config, CPU, 5)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = next(load_batches(images, batches(images), config, CPU))
    targets = [{**empty, "masks": torch.zeros(0, *image.shape[1:], dtype=torch.uint8)} for image in batch.images]
    step = trainer.step(batch._replace(targets=targets), 0)
    assert not step.not_finite and step.losses["loss_objectness"] > 0 and step.losses["loss_box_reg"] == 0


def test_warning_about_a_long_warm_up(data, tmp_path, capsys):
    run(tmp_path, data, "training.epochs=1", "training.warmup_iterations=2")
    printed = capsys.readouterr().out
    assert "the learning rate rises over 2 of 5 iterations: set training.warmup_iterations lower" in printed
    assert "9 images, 1 epoch of 5 iterations with 2 images" in printed
    run(tmp_path, data, "training.epochs=1", "training.warmup_iterations=2", resume=True)
    assert "the learning rate rises" not in capsys.readouterr().out


def test_offsets_and_masks_are_logged_and_change_nothing(data, tmp_path):
    run(tmp_path / "logged", data, "training.log_offsets_every=4")
    run(tmp_path / "not", data, "training.log_offsets_every=0")
    assert_equal(*(load_checkpoint(tmp_path / name / MODEL)["model"] for name in ("logged", "not")))
    logged, not_logged = (
        EventAccumulator(str(tmp_path / name / "tensorboard"), {"histograms": 0}).Reload() for name in ("logged", "not")
    )
    assert not not_logged.Tags()["histograms"]
    layers = {name.partition("/")[2] for name in logged.Tags()["histograms"]}
    assert {"backbone.body.layer4.1.conv2", "roi_heads.box_roi_pool.pools.0"} <= layers
    for layer in layers:
        for tag in (f"offsets/{layer}", f"masks/{layer}"):
            assert [event.step for event in logged.Histograms(tag)] == [4, 8]
        assert 0 <= logged.Scalars(f"off_the_map/{layer}")[-1].value <= 1
        # Masks are scaled sigmoids, which start at one half.
        mean = TINY.network.roi_mask_scale / 2 if "pool" in layer else TINY.network.conv_mask_scale / 2
        assert logged.Scalars(f"masks_mean/{layer}")[0].value == pytest.approx(mean, abs=0.1)


def test_memory_is_not_reported_on_windows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "resource", None)
    with Progress(tmp_path, CPU, first=0, total=1, per_epoch=1) as progress:
        progress.iteration(1, {"loss_a": 1.0}, 0.1, 1.0)
    assert capsys.readouterr().err.endswith("ETA 0:00:00\n")


def test_the_bar_of_a_terminal(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path, data, "training.epochs=1")
    shown = capsys.readouterr().err
    assert (
        re.search(r"5/5 .*it.*loss \d+\.\d+ \(classifier .*, lr 0\.02, \d+ MiB", shown) and "iteration 5" not in shown
    )


# Errors


def test_a_folder_with_a_run_is_not_overwritten(uninterrupted, data, tmp_path):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*.pth")}
    with pytest.raises(UserError, match=r"checkpoint\.pth exists: go on with --resume"):
        run(uninterrupted, data)
    assert before == {path: path.read_bytes() for path in uninterrupted.rglob("*.pth")}
    (tmp_path / MODEL).touch()
    with pytest.raises(UserError, match=r"model\.pth exists"):
        run(tmp_path, data)
    with pytest.raises(UserError, match="cannot be made a folder"):
        run(tmp_path / MODEL / "out", data)


def test_options_that_a_checkpoint_lacks_had_their_defaults(uninterrupted, data, tmp_path):
    content = load_checkpoint(uninterrupted / CHECKPOINT)
    content["categories"] = [list(category) for category in content["categories"]]
    del content["config"]["training"]["negative_images"]
    torch.save(content, tmp_path / CHECKPOINT)
    run(tmp_path, data, resume=True)
    with pytest.raises(UserError, match=r"training\.negative_images=True, as it was trained with False"):
        run(tmp_path, data, "training.negative_images=true", resume=True)


def test_runs_that_cannot_be_resumed(uninterrupted, data, tmp_path):
    def refused(pattern: str, *assignments: str, out: Path = uninterrupted) -> None:
        with pytest.raises(UserError, match=pattern):
            run(out, data, *assignments, resume=True)

    refused("there is no such checkpoint", out=tmp_path)
    refused(r"training\.lr=0\.5, as it was trained with 0\.02; only training\.epochs, ", "training.lr=0.5")
    refused(r"network\.gamma=1\.0, as it was trained with 0\.1", "network.gamma=1")
    refused(r"iteration 10, beyond the 5 of training\.epochs=1", "training.epochs=1")

    path = tmp_path / CHECKPOINT
    content = load_checkpoint(uninterrupted / CHECKPOINT)
    content["categories"] = [list(category) for category in content["categories"]]

    def changed(change: Any) -> dict[str, Any]:
        optimizer = content["optimizer"]
        return optimizer | {"state": {0: {"momentum_buffer": change(optimizer["state"][0]["momentum_buffer"])}}}

    for change, pattern in (
        ({"images": 8}, "with 9 images, as it had 8"),
        ({"processes": 2}, "with 1 processes, as it had 2"),
        ({"categories": [[1, "dark"], [2, "light"]]}, r"2 categories \(1 dark, 2 light\), got 2: \(1 dark, 2 bright\)"),
        ({"optimizer": {}}, "state of the optimiser"),
        ({"optimizer": changed(lambda momentum: momentum * float("nan"))}, "state of the optimiser"),
        ({"optimizer": changed(lambda momentum: momentum[None])}, "state of the optimiser"),
        ({"optimizer": changed(lambda momentum: momentum.int())}, "state of the optimiser"),
        ({"scaler": {"scale": "65536"}}, "state of the optimiser"),
    ):
        torch.save(content | change, path)
        refused(pattern, out=tmp_path)


def test_categories_of_the_two_data_sets(data, tmp_path):
    other = json.loads(find_data(data, "train")[0].read_text())
    other["categories"][1]["name"] = "light"
    (tmp_path / "other.json").write_text(json.dumps(other))
    validation = CocoDataset(tmp_path / "other.json", data / "images", masks=False, keep_empty=True)
    with pytest.raises(UserError, match=r"2 categories \(1 dark, 2 bright\), got 2: \(1 dark, 2 light\)"):
        train(build(), TINY, dataset(data), validation, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


# Several processes


# Without torchrun, a process that has imported everything forks the two.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    "launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.exhaustive)], ids=["fork", "torchrun"]
)
def test_two_processes(data, tmp_path, monkeypatch, launcher):
    (tmp_path / "data").symlink_to(data)
    command = [sys.executable, *launcher, "-m", "tests.detector.engine.two_processes", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"process{rank}.pth") for rank in (0, 1))

    # Both halves of the first iteration in one process.
    config, images = TINY.set(EVALUATED), dataset(data)
    halves = []
    for rank, process in enumerate((first, second)):
        split = AspectRatioBatches(images.sizes, 2, seed=0, group=True, rank=rank, world_size=2)
        batch = next(load_batches(images, split, config, CPU))
        assert batch.indices == process["indices"]
        monkeypatch.setattr(trainer_module, "rank", lambda rank=rank: rank)
        model = build(config)
        halves.append((Trainer(model, config.resolve_training(), CPU, len(split)).step(batch, 0), model))
    assert not set(first["indices"]) & set(second["indices"])
    for name, loss in first["losses"].items():
        assert loss == pytest.approx(sum(step.losses[name] for step, _ in halves) / 2, rel=1e-5)
    for name, gradient in first["gradients"].items():
        both = [dict(model.named_parameters())[name].grad for _, model in halves]
        torch.testing.assert_close(gradient, sum(both) / 2)
        assert torch.equal(gradient, second["gradients"][name])
    assert not torch.allclose(both[0], both[1])

    for name in ("stepped", "trained", "resumed", "losses", "results", "shares", "stopped", "poisoned"):
        assert_equal(first[name], second[name], name)
    assert first["shares"] == [0, 1, 1]
    reader, one, same, other = first["made"]
    assert reader == same and len({reader, one, other}) == 3  # one process in the background reads the data
    (here, shared), (there, sent) = second["arrays"]
    assert here == there == [[*range(1, 10001)], [0, 2, 4], [], [0, 1]] and first["arrays"] == second["arrays"]
    assert shared == 0 and sent > 80000
    assert "nothing must have" in first["refused"][0]
    assert first["refused"] == (second["refused"][0], False) and second["refused"][1]  # the first one reports it
    assert first["ended"] == second["ended"] and "a process that reads the data ended" in first["ended"]
    assert_same_detections(first["results"], detect(build(config), images, CPU, progress=False))
    assert first["evaluated"] and not second["evaluated"]
    saved = load_checkpoint(tmp_path / "out" / MODEL)
    assert saved["iteration"] == 2 * 3
    assert_equal(dict(saved["model"]), dict(first["trained"]))
    single, _, _ = load_detector(tmp_path / "out" / MODEL, CPU)
    results = json.loads((tmp_path / "out" / "detections_bbox.json").read_text())
    assert_same_detections(results, detect(single, images, CPU, progress=False))

    # Only the second process received a signal, and only its loss was not finite.
    assert "stopped after iteration 4 of 6" in first["stopped"]
    assert_equal(first["resumed"], first["trained"])
    split = AspectRatioBatches(images.sizes, 2, seed=0, group=True, rank=1, world_size=2)
    named = re.findall(r"\d+\.png", first["poisoned"])
    assert first["poisoned"].startswith("iteration 3: the loss is not finite (loss_classifier nan")
    assert named == [f"{index}.png" for index in split.epoch(0)[2]]
