"""Run everything that needs a GPU: `make gpu`, or `python -m benchmarks.gpu [PART ...]`.

Each part runs in a separate process with its share of the time. A part that fails or exceeds its share does not affect
the next. The JSON file is rewritten after each part.
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

SHARES = {"model": 0.28, "workspace": 0.08, "tests": 0.34, "sanitizers": 0.12, "benchmark": 0.18}
"""Share of the time of each part, in the order in which they run. What decides about the library comes first."""

_MINUTES, _MINUTES_PER_PART = 10.0, 4.0

_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_FOUND_ERRORS = 97
_LAST_LINES = 4

# A rehearsal runs one test of each kind.
_REHEARSED_TESTS = (
    "tests/arrays/test_deform_conv2d.py::test_tiny_images",
    "tests/arrays/test_precision.py::test_each_precision_has_its_accuracy",
)


@dataclass(frozen=True)
class Part:
    """Commands to run one after the other, within `seconds` in total, and the JSON file that they write."""

    name: str
    commands: Sequence[Sequence[str]]
    seconds: float
    results: Path | None = None


@dataclass
class Outcome:
    """Result of a part; `status` is passed, failed or ended (out of time)."""

    name: str
    status: str = "passed"
    seconds: float = 0.0
    log: str = ""
    last_lines: list[str] = field(default_factory=list)
    results: Any = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with _sanitizer(options.rehearse) as sanitizer:
        minutes = options.minutes or min(_MINUTES, _MINUTES_PER_PART * len(options.parts or SHARES))
        parts = parts_of(options.parts, 60 * minutes, options.out, options.rehearse, sanitizer)
        return run_parts(parts, options.out, options.rehearse)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SHARES)}; default: all")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time for all parts together; default: {_MINUTES:g}, or {_MINUTES_PER_PART:g} per part if that is less",
    )
    out = environment.ROOT / "out" / "gpu"
    parser.add_argument("--out", type=Path, default=out, help="folder for the results; default: out/gpu")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU, on emulated kernels")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in SHARES]
    if unknown:
        parser.error(f"parts are {', '.join(SHARES)}, got {unknown[0]}")
    options.out = options.out.resolve()
    return options


def parts_of(names: Sequence[str], seconds: float, out: Path, rehearse: bool, sanitizer: str | None) -> list[Part]:
    """Return the named parts, or all, with their shares of the time."""
    chosen = [name for name in SHARES if name in (names or SHARES)]
    whole = sum(SHARES[name] for name in chosen)
    return [_part(name, seconds * SHARES[name] / whole, out, rehearse, sanitizer) for name in chosen]


def _part(name: str, seconds: float, out: Path, rehearse: bool, sanitizer: str | None) -> Part:
    module = (sys.executable, "-m")
    if name == "tests":
        pytest = (*module, "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=brief")
        # Parallel, because compilation dominates. The detector's tests add nothing that is specific to a GPU.
        on_gpu = ("-m", "gpu", "-n", str(min(8, environment.usable_cores())), "--ignore=tests/detector")
        return Part(name, [[*pytest, *(_REHEARSED_TESTS if rehearse else on_gpu)]], seconds)
    if name == "sanitizers":
        checker = (sanitizer or "compute-sanitizer", "--error-exitcode", str(_FOUND_ERRORS))
        cases = (*module, "tests.cuda.sanitizer_cases", *(["--rehearse"] if rehearse else []))
        return Part(name, [[*checker, "--tool", tool, *cases] for tool in _SANITIZERS], seconds)
    results = out / f"{name}.json"
    # Measurements stop starting rows before their time is up.
    share = 0.65 if name == "model" else 0.8
    limits = ("--minutes", f"{share * seconds / 60:.3f}", "--output", str(results))
    if name == "benchmark":
        command = ["tests.benchmarks.rehearse"] if rehearse else ["benchmarks", "--device", "cuda"]
        command += ["--parts", "forward", "backward", "memory"]
    elif name == "workspace":
        command = ["tests.benchmarks.rehearse", "workspace"] if rehearse else ["benchmarks.workspace"]
    else:
        command = ["benchmarks.model", "--device", "rehearsal" if rehearse else "cuda"]
        regular = ["benchmarks.regular", "--seconds", f"{0.05 * seconds:.0f}", "--output", str(out / "regular.json")]
        regular += ["--device", "cpu", "--size", "32", "--batch", "1"] if rehearse else []
        return Part(name, [[*module, *command, *limits], [*module, *regular]], seconds, results)
    return Part(name, [[*module, *command, *limits]], seconds, results)


def run_parts(parts: Sequence[Part], out: Path, rehearse: bool = False) -> int:
    """Run all parts, print the table and return the exit status."""
    document: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if rehearse:
        document["rehearsal"] = environment.REHEARSAL
    document["environment"] = _environment(rehearse)
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"{part.name}: at most {part.seconds:.0f} s", file=sys.stderr, flush=True)
        outcomes.append(_run(part, out))
        document["parts"] = [asdict(outcome) for outcome in outcomes]
        write_json(out / "gpu.json", document)
    print(_table(outcomes))
    if rehearse:
        print(f"REHEARSAL: {environment.REHEARSAL}")
    print(f"written to {out / 'gpu.json'}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def _run(part: Part, out: Path) -> Outcome:
    outcome = Outcome(part.name, log=str(out / f"{part.name}.log"))
    if part.results is not None:
        # Do not report the results of an earlier run.
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
            command,
            cwd=environment.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        print(f"cannot run {command[0]}: {error}", file=log, flush=True)
        return "failed"
    try:
        return "passed" if process.wait(max(seconds, 0.1)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "ended"
    finally:
        # This also kills the processes that the command started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _table(outcomes: Sequence[Outcome]) -> str:
    lines = [["part", "status", "seconds", "last line"]]
    for outcome in outcomes:
        last = outcome.last_lines[-1] if outcome.last_lines else ""
        lines.append([outcome.name, outcome.status, f"{outcome.seconds:.0f}", last[:80]])
    for outcome in outcomes:
        for target in (outcome.results or {}).get("targets", []):
            limit, verdict = f"{target['relation']} {target['limit']:g}", "holds" if target["holds"] else "MISSED"
            lines.append([target["name"], f"{target['value']:.3g}", limit, verdict])
    return markdown(lines)


def _environment(rehearse: bool) -> dict[str, Any]:
    try:
        return environment.describe(environment.usable_cores(), gpu=not rehearse)
    except Exception as error:
        # A device that does not respond is a result, too.
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def _sanitizer(rehearse: bool) -> Iterator[str | None]:
    """Find compute-sanitizer; a rehearsal uses a script that only runs the given program."""
    if rehearse:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "compute-sanitizer"
            script.write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
            script.chmod(0o755)
            yield str(script)
        return
    found = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if found is None and home:
            found = shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    yield found


if __name__ == "__main__":
    sys.exit(main())
