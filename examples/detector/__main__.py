"""The command line: ``dcnops-detector COMMAND``, also ``python -m dcnops.detector COMMAND``."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import time
from collections.abc import Sequence

from .command_line import parse
from .command_options import COMMANDS
from .config import describe_options
from .errors import Interrupted, UserError, os_problem, printable

GRACE = 2  # seconds in which the first process reports an error; torchrun ends all processes after one has ended
PROGRAM = f"python -m {__package__}" if __name__ == "__main__" else "dcnops-detector"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Without `arguments`, those of the process are used. The code is 2 after a mistake of the user, which is printed as
    one line on stderr. After a signal that ended a training run, it is 128 + the number of the signal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths and names may have characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    is_program = arguments is None  # this process has no other purpose
    if is_program:
        os.environ["MPLBACKEND"] = "agg"  # notebooks export a backend that other environments may lack
    # OpenMP reads this when torch is imported. By default, its waiting threads keep the cores busy, which makes an
    # iteration many times slower if another program uses the machine as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = None
    epilogs = {"train": f"options for --set, with their defaults:\n{describe_options()}"}
    try:
        command, options = parse(
            arguments,
            {name: (kind, epilogs.get(name, "")) for name, kind in COMMANDS.items()},
            PROGRAM,
            "Faster and Mask R-CNN with deformable convolution and RoI pooling (Deformable ConvNets v2).",
        )
        # The packages take seconds to import, and help and wrong options need none of them.
        if is_program:
            gc.disable()  # a fifth of that time would go into searching for garbage where everything is in use
        from .commands import RUN

        if is_program:
            gc.freeze()  # nor are imported objects searched later
            gc.enable()
        RUN[command](options)
        sys.stdout.flush()
    except UserError as error:
        # All processes have the same options.
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if error.reported or (command is None and under_torchrun and os.environ.get("LOCAL_RANK") != "0"):
            time.sleep(GRACE)
            return 2
        return _report_error(str(error))
    except ModuleNotFoundError as error:
        return _report_missing(error)
    except Interrupted as interruption:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(interruption, file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of the pipe has closed it
        return 0
    except OSError as error:  # of a disk that is full or read-only, a path that is too long, and the like
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        return _report_error(f"{error.filename or 'output'}: {os_problem(error)}")
    return 0


def _report_missing(error: ModuleNotFoundError) -> int:
    """Name the extra that installs a missing package, and return the exit code."""
    package = str(error.name).partition(".")[0]
    if package in ("dcnops", "examples"):
        raise error
    extra = "onnx" if package.startswith("onnx") else "detector"
    print(f"error: the package {package} is missing: pip install 'dcnops[{extra}]'", file=sys.stderr)
    return 2


def _discard_output() -> None:
    """Keep the flush at exit from failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_error(message: str) -> int:
    rank = os.environ.get("RANK") or "0"
    print(f"error{'' if rank == '0' else f' in process {rank}'}: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
