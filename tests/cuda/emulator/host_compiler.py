"""Compile a CUDA source with the host compiler and run its kernel on the CPU. README.md lists what this catches."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dcnops._errors import KernelCompileError
from tests.cuda.emulator.sanitizers import is_sanitized

_HERE = Path(__file__).resolve().parent
_SCHEDULES = ("forward", "reverse", "random")
_MAX_THREADS = 1024
_MAX_SHARED_BYTES = 232_448
"""Limit of a block on sm_90."""

_KERNEL = re.compile(r"\bDCN_KERNEL\((\w+)\)\(")

_COMMON = ("-std=c++17", "-fPIC", "-shared", "-pthread", "-g1")  # reports and breakpoints need lines only
_PLAIN = (*_COMMON, "-O1", "-finline-small-functions")  # -O2 takes longer to compile than it saves in one run
_SANITIZED = (
    *_COMMON,
    "-O0",  # the kernels run half as fast as with -O1, but compile in half the time, which is most of it
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)


class KernelFault(RuntimeError):
    """A kernel broke a rule of CUDA."""


class _LaunchConfig(ctypes.Structure):
    """`LaunchConfig` of scheduler.h."""

    _fields_ = [
        ("grid", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("schedule", ctypes.c_int),
        ("os_threads", ctypes.c_uint),
        ("seed", ctypes.c_ulonglong),
    ]


class HostCompiler:
    """Compiler that makes the kernels of an `Engine` run on the CPU.

    Parameters
    ----------
    cache : path, optional
        Folder of the compiled objects, shared by all processes. Default: ``~/.cache/dcnops-cuda-on-cpu``.
    schedule : {"forward", "reverse", "random"}
        Order of threads and blocks.
    seed : int
        Seed of the random schedule. The same seed, kernel and grid always run in the same order.
    single_block : bool
        Launch every kernel with one block, regardless of the grid.
    threads : int
        OS threads that share the blocks of a launch.
    sanitize : bool
        Compile with AddressSanitizer and UBSan. Only in a process started by `run_sanitized`.

    Attributes
    ----------
    builds : int
        Number of objects that were not in the cache.
    """

    def __init__(
        self,
        cache: str | os.PathLike[str] | None = None,
        *,
        schedule: str = "forward",
        seed: int = 0,
        single_block: bool = False,
        threads: int = 1,
        sanitize: bool = False,
    ) -> None:
        if schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
        if sanitize and not is_sanitized():
            raise RuntimeError("sanitized kernels run only in a process started by run_sanitized")
        self.cache = Path(cache) if cache is not None else _default_cache()
        self.schedule = schedule
        self.seed = seed
        self.single_block = single_block
        self.threads = threads
        self.builds = 0
        self._flags = _SANITIZED if sanitize else _PLAIN

    def compile(self, source: str, kernel: str, options: Sequence[str]) -> HostKernel:
        """Compile `source` with the macros in NVRTC's `options`, and return its `kernel`.

        Raises
        ------
        KernelCompileError
            The source does not compile. The message has the compiler's log.
        """
        scheduler = self.scheduler()
        defines = tuple(option for option in options if option.startswith("-D"))
        entries = (f'#line 1 "entry of {name}"\nCUDA_ON_CPU_ENTRY({name})\n' for name in _kernels(source, kernel))
        unit = self._build(
            f"{source}\n{''.join(entries)}",
            (*self._flags, *defines),
            ("-include", str(_HERE / "emulator.h"), f"-L{self.cache}"),
            # The unit finds the scheduler in its own folder, so that the folder can be moved.
            (f"-l:{scheduler.name}", "-Wl,-rpath,$ORIGIN"),
        )
        return HostKernel(self, _load(unit), kernel)

    def scheduler(self) -> Path:
        """Return the library that runs the threads of all kernels, compiled."""
        return self._build(_scheduler(), self._flags, (f"-I{_HERE}",))

    def _build(
        self, source: str, flags: tuple[str, ...], paths: tuple[str, ...], libraries: tuple[str, ...] = ()
    ) -> Path:
        compiler, version = _compiler()
        key = hashlib.sha256("\0".join((version, _headers(), *flags, *libraries, source)).encode()).hexdigest()[:32]
        path = self.cache / f"{key}.so"
        if path.exists():
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with open(self.cache / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._run_compiler(compiler, source, (*flags, *paths), (f"-Wl,-soname,{path.name}", *libraries), path)
        return path

    def _run_compiler(
        self, compiler: str, source: str, flags: tuple[str, ...], linking: tuple[str, ...], path: Path
    ) -> None:
        self.builds += 1
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
            built = Path(scratch) / path.name
            place = (f"-fdebug-prefix-map={scratch}=.", "-x", "c++", "-", "-o", str(built))
            command = [compiler, *flags, *place, *linking]
            done = subprocess.run(
                command, input=source, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise KernelCompileError(f"{' '.join(command)}\n{done.stderr}")
            built.replace(path)


class HostKernel:
    """Kernel compiled for the CPU, a `dcnops._backends.cuda.engine.Launcher`."""

    def __init__(self, compiler: HostCompiler, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._compiler = compiler
        params_size, run = library[f"{name}_params_size"], library[f"{name}_run"]
        params_size.restype = ctypes.c_uint
        run.restype = ctypes.c_char_p
        run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._params_size: int = params_size()
        self._run: Callable[..., bytes | None] = run

    def __call__(self, grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
        """Run the kernel to its end.

        Raises
        ------
        KernelFault
            The launch is illegal, or a thread broke a rule.
        """
        settings = self._compiler
        if not 1 <= grid < 2**31:
            raise KernelFault(f"{self.name}: a grid has from 1 to 2**31 - 1 blocks, got {grid}")
        if min(block) < 1 or block[0] * block[1] > _MAX_THREADS:
            raise KernelFault(f"{self.name}: a block has from 1 to {_MAX_THREADS} threads, got {block}")
        if not 0 <= shared_bytes <= _MAX_SHARED_BYTES:
            raise KernelFault(f"{self.name}: at most {_MAX_SHARED_BYTES} bytes of shared memory, got {shared_bytes}")
        if ctypes.sizeof(params) != self._params_size:
            raise KernelFault(
                f"{self.name}: the kernel takes {self._params_size} bytes of parameters, got {ctypes.sizeof(params)}"
            )
        config = _LaunchConfig(
            1 if settings.single_block else grid,
            *block,
            shared_bytes,
            _SCHEDULES.index(settings.schedule),
            settings.threads,
            settings.seed % 2**64,
        )
        report = self._run(ctypes.byref(params), ctypes.byref(config))
        if report is not None:
            seed = f", seed {settings.seed}" if settings.schedule == "random" else ""
            raise KernelFault(f"{self.name}: {report.decode()} (schedule {settings.schedule}{seed})")


def _kernels(source: str, kernel: str) -> list[str]:
    """Return the names of all kernels of the unit of `kernel`: they are compiled at once."""
    suffix = kernel.rpartition("_")[2]
    unit = [f"{name}_{suffix}" for name in _KERNEL.findall(source)]
    return unit if kernel in unit else [kernel]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcnops-cuda-on-cpu"


@functools.cache
def _compiler() -> tuple[str, str]:
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError("the CUDA kernels are tested through g++, and there is no g++ on the PATH: install it")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return path, done.stdout


@functools.cache
def _scheduler() -> str:
    return '#line 1 "scheduler.cpp"\n' + (_HERE / "scheduler.cpp").read_text(encoding="utf-8")


@functools.cache
def _headers() -> str:
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in ("scheduler.h", "emulator.h", "ptx.h"))


_LOADED: dict[Path, ctypes.CDLL] = {}
_LOADING = threading.Lock()


def _load(path: Path) -> ctypes.CDLL:
    with _LOADING:
        library = _LOADED.get(path)
        if library is None:
            library = _LOADED[path] = ctypes.CDLL(str(path))
        return library
