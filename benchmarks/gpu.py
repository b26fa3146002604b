"""Everything a GPU has to show, in one command: `make gpu`, or `python -m benchmarks.gpu [PART ...]`.

Each part runs in a process of its own, for no longer than its share of the time; the next begins when it has failed or
was ended. The results so far are in the JSON file after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.report import markdown, write_json

SHARES = {"tests": 0.4, "sanitizers": 0.15, "benchmark": 0.34, "model": 0.11}
"""Of the whole time, in the order in which the parts run."""

_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_FOUND_ERRORS = 97
_ROOT = Path(__file__).parents[1]
_LAST_LINES = 4

# Of the tests without a GPU, one of each kind stands for them in a rehearsal.
_REHEARSED_TESTS = (
    "tests/arrays/test_deform_conv2d.py::test_tiny_images",
    "tests/arrays/test_precision.py::test_each_precision_has_its_accuracy",
)


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes
    ----------
    name : str
    commands : sequence of command lines, run one after the other
    seconds : float
        After which it is ended, with all processes that it started.
    results : path, optional
        JSON that it writes.
    """

    name: str
    commands: Sequence[Sequence[str]]
    seconds: float
    results: Path | None = None


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str = "passed"
    """passed, failed or ended."""
    seconds: float = 0.0
    log: str = ""
    last_lines: list[str] = field(default_factory=list)
    results: Any = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with _sanitizer(options.rehearse) as sanitizer:
        parts = parts_of(options.parts, 60 * options.minutes, options.out, options.rehearse, sanitizer)
        return run_parts(parts, options.out, options.rehearse)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SHARES)}; default: all")
    parser.add_argument("--minutes", type=float, default=10, help="for all of them together; default: 10")
    parser.add_argument("--out", type=Path, default=_ROOT / "out" / "gpu", help="folder of results; default: out/gpu")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions without a GPU")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in SHARES]
    if unknown:
        parser.error(f"parts are {', '.join(SHARES)}, got {unknown[0]}")
    options.out = options.out.resolve()
    return options


def parts_of(names: Sequence[str], seconds: float, out: Path, rehearse: bool, sanitizer: str | None) -> list[Part]:
    """The named parts, or all, with their shares of the time."""
    chosen = [name for name in SHARES if name in (names or SHARES)]
    whole = sum(SHARES[name] for name in chosen)
    device = "rehearsal" if rehearse else "cuda"
    found = []
    for name in chosen:
        share = seconds * SHARES[name] / whole
        # What measures stops beginning rows before its process is ended.
        limits = ("--minutes", f"{0.8 * share / 60:.3f}")
        commands, results = [], None
        if name == "tests":
            pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=brief")
            # Most of the time goes into compiling, which several processes share. The detector needs no GPU of its own.
            on_gpu = ("-m", "gpu", "-n", str(min(8, environment.usable_cores())), "--ignore=tests/detector")
            commands = [[*pytest, *(_REHEARSED_TESTS if rehearse else on_gpu)]]
        elif name == "sanitizers":
            cases = (sys.executable, "-m", "benchmarks.sanitizer_cases", *(["--rehearse"] if rehearse else []))
            commands = [
                [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS), *cases]
                for tool in _SANITIZERS
            ]
        elif name == "benchmark":
            results = out / "benchmark.json"
            measured = ("--parts", "forward", "backward", "memory", "--output", str(results))
            commands = [[sys.executable, "-m", "benchmarks", "--device", device, *measured, *limits]]
        else:
            results = out / "model.json"
            measured = ("--device", device, "--output", str(results))
            commands = [[sys.executable, "-m", "benchmarks.model", *measured, *limits]]
        found.append(Part(name, commands, share, results))
    return found


def run_parts(parts: Sequence[Part], out: Path, rehearse: bool = False) -> int:
    """Run them, whatever becomes of them; print the table; the exit status."""
    document: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if rehearse:
        document["rehearsal"] = "made without a GPU: no figure is a measurement"
    document["environment"] = _environment(rehearse)
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"{part.name}: at most {part.seconds:.0f} s", file=sys.stderr, flush=True)
        outcomes.append(_run(part, out))
        document["parts"] = [asdict(outcome) for outcome in outcomes]
        write_json(out / "gpu.json", document)
    print(_table(outcomes))
    if rehearse:
        print("REHEARSAL: made without a GPU, no figure is a measurement")
    print(f"written to {out / 'gpu.json'}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def _run(part: Part, out: Path) -> Outcome:
    outcome = Outcome(part.name, log=str(out / f"{part.name}.log"))
    if part.results is not None:
        # What an earlier run has left is not this one's.
        part.results.unlink(missing_ok=True)
    begin = time.monotonic()
    with open(outcome.log, "w") as log:
        for command in part.commands:
            left = part.seconds - (time.monotonic() - begin)
            status = _run_command(command, left, log)
            if status != "passed":
                outcome.status = status
                if status == "ended":
                    break
    outcome.seconds = time.monotonic() - begin
    lines = Path(outcome.log).read_text(errors="replace").splitlines()
    outcome.last_lines = [line for line in lines if line.strip()][-_LAST_LINES:]
    if part.results is not None and part.results.exists():
        outcome.results = json.loads(part.results.read_text())
    return outcome


def _run_command(command: Sequence[str], seconds: float, log: Any) -> str:
    print("$", *command, file=log, flush=True)
    try:
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        print(f"cannot run {command[0]}: {error}", file=log, flush=True)
        return "failed"
    try:
        return "passed" if process.wait(max(seconds, 0.1)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "ended"
    finally:
        # Whatever it started goes with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _table(outcomes: Sequence[Outcome]) -> str:
    lines = [["part", "status", "seconds", "last line"]]
    for outcome in outcomes:
        last = outcome.last_lines[-1] if outcome.last_lines else ""
        lines.append([outcome.name, outcome.status, f"{outcome.seconds:.0f}", last[:80]])
    targets = [
        [target["name"], f"{target['value']:.3g}", f"{target['relation']} {target['limit']:g}", _verdict(target)]
        for outcome in outcomes
        for target in (outcome.results or {}).get("targets", [])
    ]
    for target in targets:
        lines.append(target)
    return markdown(lines)


def _verdict(target: dict[str, Any]) -> str:
    return "holds" if target["holds"] else "MISSED"


def _environment(rehearse: bool) -> dict[str, Any]:
    try:
        return environment.describe(environment.usable_cores(), gpu=not rehearse)
    except Exception as error:
        # A device that does not answer is a result, too.
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def _sanitizer(rehearse: bool) -> Iterator[str | None]:
    """compute-sanitizer, or None; in a rehearsal what runs the program that it is given, and nothing else."""
    if rehearse:
        with tempfile.TemporaryDirectory() as folder:
            stand_in = Path(folder) / "compute-sanitizer"
            stand_in.write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
            stand_in.chmod(0o755)
            yield str(stand_in)
        return
    found = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if found is None and home:
            found = shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    yield found


if __name__ == "__main__":
    sys.exit(main())
