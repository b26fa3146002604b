"""``python -m dcnops``: what is installed, what works, and what is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from dcnops._diagnosis import describe, find_out
from dcnops._errors import DcnError
from dcnops._prefetch import LIBRARIES, prefetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the diagnosis, or compile ahead of time.

    Returns
    -------
    int
        0; 1 if an installed backend does not work; 2 for a wrong command.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dcnops", description="Versions, devices, backends and caches, and what is wrong with them."
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser(
        "prefetch",
        help="compile ahead of the first call",
        description="Compile what calls with these arrays need (dcnops.prefetch), which is kept on disk.",
    )
    command.add_argument("--library", choices=LIBRARIES, default="numpy", help="of the arrays; default: %(default)s")
    command.add_argument("--dtypes", nargs="+", default=["float32"], metavar="DTYPE", help="default: float32")
    command.add_argument("--input", nargs=4, type=int, default=(1, 16, 32, 32), metavar=("N", "C", "H", "W"))
    command.add_argument("--weight", nargs=4, type=int, default=(16, 16, 3, 3), metavar=("O", "C/G", "KH", "KW"))
    options = parser.parse_args(arguments)
    if "library" in options:
        begin = time.perf_counter()
        try:
            prefetch(options.library, options.dtypes, input=options.input, weight=options.weight)
        except (DcnError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"compiled in {time.perf_counter() - begin:.1f} s")
        return 0
    facts = find_out()
    print(json.dumps(facts.to_dict(), indent=1) if options.json else describe(facts))
    return 0 if facts.works else 1


if __name__ == "__main__":
    sys.exit(main())
