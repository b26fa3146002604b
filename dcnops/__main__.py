"""Command line of ``python -m dcnops``: environment report and ahead-of-time compilation."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from dcnops._diagnosis import format_report, inspect_environment
from dcnops._errors import DcnError
from dcnops._prefetch import LIBRARIES, prefetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the environment report, or compile ahead of time.

    Returns
    -------
    int
        0 for success, 1 if an installed backend does not work, 2 for a wrong command.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dcnops", description="Report versions, devices, backends and caches, with advice on problems."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser(
        "prefetch",
        help="compile ahead of the first call",
        description="Compile the code for calls of these sizes and keep it on disk (dcnops.prefetch).",
    )
    command.add_argument("--library", choices=LIBRARIES, default="numpy", help="array library; default: %(default)s")
    command.add_argument(
        "--dtypes", nargs="+", default=["float32"], metavar="DTYPE", help="data types; default: float32"
    )
    sizes: dict[str, Any] = {"nargs": 4, "type": int, "help": "default: %(default)s"}
    command.add_argument("--input", **sizes, default=(1, 16, 32, 32), metavar=("N", "C", "H", "W"))
    command.add_argument("--weight", **sizes, default=(16, 16, 3, 3), metavar=("O", "C/G", "KH", "KW"))
    command.add_argument(
        "--heads", type=int, default=1, help="heads of attention and groups of aggregation; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may have characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(options)
        sys.stdout.flush()
    except OSError as error:  # a closed pipe (| head) or a full disk
        # The flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return status


def _run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    if "library" in options:
        begin = time.perf_counter()
        try:
            sizes = {"input": options.input, "weight": options.weight, "heads": options.heads}
            prefetch(options.library, options.dtypes, **sizes)
        except (DcnError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"compiled in {time.perf_counter() - begin:.1f} s")
        return 0
    environment = inspect_environment()
    print(json.dumps(environment.to_dict(), indent=1) if options.json else format_report(environment))
    return 0 if environment.works else 1


if __name__ == "__main__":
    sys.exit(main())
