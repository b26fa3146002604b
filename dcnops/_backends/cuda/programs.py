"""Recorded launch plans: a plan runs once for a signature, and later calls replay what it launched at other addresses.

A plan depends on everything about its arrays but their addresses. `Recorder` is an engine that runs it on arrays
without memory and writes down the launches, matrix products and fills. The resulting `Program` keeps them as a flat
list in which every pointer is an array and an offset, so that a call needs one scratch allocation and one addition of
base addresses.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from dcnops._backends.cuda.engine import Engine, Launcher
from dcnops._backends.cuda.kernel_constants import VECTOR_BYTES
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import is_channels_last

_Value = TypeVar("_Value", bound=Any)
Issue: TypeAlias = Callable[[Sequence[int], int], None]
"""Issues a program for the addresses of null, arguments, results and scratch memory, on a stream."""

_SLOT_BITS = 40
"""Every recorded array has one TiB of made-up addresses, and its number is in the bits above them."""

_SCRATCH_ALIGNMENT = 256
_CACHE_BYTES = 64 * 2**20
_SEEN_SIGNATURES = 4096


class Location(NamedTuple):
    """A place in one of the arrays of a call."""

    base: int
    """0 for the null pointer, then the arguments, the results, and the scratch memory last."""
    offset: int
    """In bytes."""


class Matrices(NamedTuple):
    """A stack of matrices in one of the arrays of a call."""

    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    location: Any
    """A `Location` (an address while a plan is recorded)."""


class Launch(NamedTuple):
    """A kernel launch.

    `params` is the byte at which its struct begins in the parameters of the program (the struct's bytes while a plan
    is recorded).
    """

    launcher: Launcher
    grid: int
    block: tuple[int, int]
    shared_bytes: int
    kind: type[ctypes.Structure]
    params: Any


class Product(NamedTuple):
    """A matrix product, see `Engine.matmul`."""

    a: Matrices
    b: Matrices
    out: Matrices
    accumulate: bool
    precision: str


class Fill(NamedTuple):
    """Zeros from `location` on (an address while a plan is recorded)."""

    location: Any
    nbytes: int


Step: TypeAlias = Launch | Product | Fill


class ArrayForm(NamedTuple):
    """All that a plan sees of an array but its address."""

    shape: tuple[int, ...]
    dtype: Any
    channels_last: bool = False
    strides: tuple[int, ...] | None = None
    """In bytes, if the array is neither C-contiguous nor channels-last."""
    aligned: bool = True

    @classmethod
    def of(cls, engine: Engine, array: Any) -> ArrayForm:
        aligned = (engine.pointer(array) or 0) % VECTOR_BYTES == 0
        channels_last = array.ndim == 4 and is_channels_last(array)
        strides = None if channels_last or array.flags.c_contiguous else array.strides
        return cls(array.shape, array.dtype, channels_last, strides, aligned)

    def empty(self, engine: Engine) -> Any:
        """Return a new array of this form, which has no strides of its own."""
        assert self.strides is None
        if not self.channels_last:
            return engine.empty(self.shape, self.dtype)
        N, C, H, W = self.shape
        return engine.empty((N, H, W, C), self.dtype).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Program:
    """The launches of one signature.

    Attributes
    ----------
    steps : tuple of Launch, Product and Fill
        In the order in which they are issued.
    params : numpy.ndarray [words], uint64
        The parameter structs of all launches; pointers hold their offsets.
    pointers, bases : numpy.ndarray [pointers], intp
        Words of `params` that are pointers, and the base that is added to each.
    results : tuple of ArrayForm
    scratch_base, scratch_bytes : int
        Base of the scratch memory, which is the last one, and its size.
    """

    steps: tuple[Step, ...]
    params: np.ndarray
    pointers: np.ndarray
    bases: np.ndarray
    results: tuple[ArrayForm, ...]
    scratch_base: int
    scratch_bytes: int

    @property
    def base_count(self) -> int:
        """Bases of a call: null, the arguments, the results, and the scratch memory."""
        return self.scratch_base + 1

    @property
    def nbytes(self) -> int:
        """Approximate host memory of the program."""
        return self.params.nbytes + self.pointers.nbytes + self.bases.nbytes + 512 * len(self.steps)

    def located_params(self, addresses: Sequence[int]) -> np.ndarray:
        """Return the parameter structs of a call with its `addresses` of null, arguments, results and scratch."""
        params = self.params.copy()
        params[self.pointers] += np.array(addresses, np.uint64)[self.bases]
        return params


class Recorder(Engine):
    """Engine on arrays without memory that writes down what a plan launches on `engine`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(
            _MemorylessArrays(self), _compile_nothing, self._record_product, lambda: engine.device, _address
        )
        self._engine = engine
        self._steps: list[Any] = []
        self._sizes: list[int] = []
        self._lifetimes: list[int] = []
        """The number of an array when the plan makes it, and minus that number when the plan releases it."""

    def kernel(self, unit: str, kernel: str, macros: Macros) -> Launcher:
        launcher = self._engine.kernel(unit, kernel, macros)

        def record(grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
            self._steps.append(Launch(launcher, grid, block, shared_bytes, type(params), bytes(params)))

        return record

    def new_array(self, shape: tuple[int, ...], dtype: Any) -> _MemorylessArray:
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        assert nbytes < 2**_SLOT_BITS
        self._sizes.append(nbytes)
        slot = len(self._sizes)
        addresses = _AddressRange(slot << _SLOT_BITS, max(nbytes, 1))
        self._lifetimes.append(slot)
        weakref.finalize(addresses, self._lifetimes.append, -slot)
        memory = np.asarray(addresses)
        array = memory[:nbytes].view(_MemorylessArray)
        array.recorder = self
        return array.view(kind).reshape(shape)  # type: ignore[no-any-return]

    def _argument(self, form: ArrayForm) -> Any:
        if form.strides is None:
            return form.empty(self)
        span = form.dtype.itemsize + sum((n - 1) * stride for n, stride in zip(form.shape, form.strides))
        memory = self.new_array((span,), np.uint8).view(form.dtype)
        return as_strided(memory, form.shape, form.strides, subok=True)

    def record_fill(self, array: Any) -> None:
        self._steps.append(Fill(_address(array), array.nbytes))

    def _record_product(self, a: Any, b: Any, out: Any, accumulate: bool, precision: str) -> None:
        # Not the arrays themselves, which would keep scratch memory from being used again.
        factor_a, factor_b, target = (
            Matrices(array.dtype, array.shape, array.strides, _address(array)) for array in (a, b, out)
        )
        self._steps.append(Product(factor_a, factor_b, target, accumulate, precision))

    def record(
        self, plan: Callable[..., Any], geometry: Any, forms: Sequence[ArrayForm | None], options: tuple[Any, ...]
    ) -> tuple[Program, tuple[str, ...] | None]:
        """Run a plan on arguments of these forms; return its program, and the names of its results if it has any."""
        self._steps.clear()
        self._sizes.clear()
        self._lifetimes = []  # not the list of an earlier plan, of which arrays may be left
        arrays = [None if form is None else self._argument(form) for form in forms]
        arguments = len(self._sizes)
        returned = plan(self, geometry, *arrays, *options)
        results = list(returned.values()) if isinstance(returned, dict) else [returned]
        program = _Assembler(self._steps, self._sizes, self._lifetimes, arguments, results).program()
        return program, tuple(returned) if isinstance(returned, dict) else None


class _Assembler:
    """Turns the recorded steps of a plan into a `Program`: places scratch arrays, resolves made-up addresses."""

    def __init__(
        self,
        steps: Sequence[Any],
        sizes: Sequence[int],
        lifetimes: Sequence[int],
        arguments: int,
        results: Sequence[Any],
    ) -> None:
        self._results, self._sizes = results, sizes
        self._params = bytearray()
        self._pointers: list[int] = []
        self._bases: list[int] = []
        slots = [*range(arguments + 1), *(_address(array) >> _SLOT_BITS for array in results)]
        self._places = {slot: Location(base, 0) for base, slot in enumerate(slots)}
        self._scratch_base, self._scratch_bytes = len(slots), 0
        opening = list(itertools.takewhile(lambda step: isinstance(step, Fill), steps))
        zeroed = [step.location >> _SLOT_BITS for step in opening]
        scratch = [slot for slot in range(1, len(sizes) + 1) if slot not in self._places]
        # Scratch arrays that are zeroed at first lie together, so that one fill is enough.
        together = [slot for slot in scratch if slot in zeroed]
        self._place(together)
        fills = [Fill(Location(self._scratch_base, 0), self._scratch_bytes)] if together else []
        others = set(scratch).difference(together)
        self._place([event for event in lifetimes if abs(event) in others])
        rest = [step for step, slot in zip(opening, zeroed) if slot not in together]
        self._steps = [*fills, *map(self._resolve, [*rest, *steps[len(opening) :]])]

    def program(self) -> Program:
        forms = [
            ArrayForm(array.shape, array.dtype, array.ndim == 4 and is_channels_last(array)) for array in self._results
        ]
        return Program(
            tuple(self._steps),
            np.frombuffer(bytes(self._params), np.uint64),
            np.array(self._pointers, np.intp),
            np.array(self._bases, np.intp),
            tuple(forms),
            self._scratch_base,
            self._scratch_bytes,
        )

    def _place(self, lifetimes: Sequence[int]) -> None:
        """Place scratch arrays after those that were placed before; what the plan released is used again."""
        first = self._scratch_bytes
        held: dict[int, tuple[int, int]] = {}
        for event in lifetimes:
            if event < 0:
                del held[-event]
                continue
            nbytes = -(-self._sizes[event - 1] // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
            begin = first
            for lower, upper in sorted(held.values()):
                if begin + nbytes <= lower:
                    break
                begin = max(begin, upper)
            held[event] = begin, begin + nbytes
            self._places[event] = Location(self._scratch_base, begin)
            self._scratch_bytes = max(self._scratch_bytes, begin + nbytes)

    def _resolve(self, step: Step) -> Step:
        if isinstance(step, Fill):
            return step._replace(location=self._locate(step.location))
        if isinstance(step, Product):
            a, b, out = (
                matrices._replace(location=self._locate(matrices.location)) for matrices in (step.a, step.b, step.out)
            )
            return step._replace(a=a, b=b, out=out)
        return step._replace(params=self._add_params(step.kind, step.params))

    def _add_params(self, kind: type[ctypes.Structure], data: bytes) -> int:
        """Append a parameter struct, its pointers being offsets, and return where it begins."""
        start = len(self._params)
        self._params += data + bytes(-len(data) % 16)
        for field in pointer_fields(kind):
            base, offset = self._locate(int.from_bytes(data[field : field + 8], "little"))
            if base:
                self._params[start + field : start + field + 8] = offset.to_bytes(8, "little")
                self._pointers.append((start + field) // 8)
                self._bases.append(base)
        return start

    def _locate(self, address: int) -> Location:
        base, start = self._places[address >> _SLOT_BITS]
        return Location(base, start + (address & (2**_SLOT_BITS - 1)))


class Replay(NamedTuple):
    """A program, the names of its results (None for a single one), and the function that issues it."""

    program: Program
    names: tuple[str, ...] | None
    issue: Issue

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self.program.nbytes

    def run(self, engine: Engine, stream: int, arrays: Sequence[Any | None]) -> Any:
        """Issue the program for arrays of the engine's library; return what its plan would return."""
        program = self.program
        results = [form.empty(engine) for form in program.results]
        scratch = engine.empty((program.scratch_bytes,), engine.xp.uint8)
        given = [array for array in arrays if array is not None]
        addresses = [0, *(engine.pointer(array) or 0 for array in (*given, *results, scratch))]
        self.issue(addresses, stream)
        return results[0] if self.names is None else dict(zip(self.names, results))


class SignatureCache(Generic[_Value]):
    """Cache of values that are made for signatures seen twice, bounded in bytes.

    Nothing is made for a signature that is seen for the first time, so that changing sizes do not pay for recording.
    The oldest values are dropped when memory runs short.

    Parameters
    ----------
    max_bytes : int
        Limit of the sum of the values' `nbytes`.
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._values: dict[Hashable, _Value] = {}
        self._seen: dict[Hashable, None] = {}
        self._lock = threading.Lock()
        self.get = self._values.get
        """Return the value of a signature, or None."""

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Host memory of all values."""
        return sum(value.nbytes for value in self._values.values())

    def add(self, signature: Hashable, make: Callable[[], _Value]) -> _Value | None:
        """Return ``make()``, and keep it, if the signature was `see`n before; otherwise return None."""
        with self._lock:
            if signature not in self._seen:
                return None
            if signature not in self._values:
                self._values[signature] = make()
        self.trim()
        return self._values.get(signature)

    def see(self, signature: Hashable) -> None:
        """Note that a call of this signature has worked."""
        with self._lock:
            self._seen[signature] = None
            if len(self._seen) > _SEEN_SIGNATURES:
                del self._seen[next(iter(self._seen))]

    def trim(self) -> None:
        """Drop the oldest values until the rest is within the limit."""
        with self._lock:
            while self.nbytes > self._max_bytes:
                del self._values[next(iter(self._values))]


class ProgramCache:
    """Runs plans on an engine, and replays the calls with a signature that was seen before.

    Parameters
    ----------
    engine : Engine
    prepare : callable
        Returns a function ``issue(addresses, stream)`` for a `Program` of the current device.
    stream : callable
        Returns the handle of the current stream.
    max_bytes : int
        Limit of the host memory of all programs.
    """

    def __init__(
        self,
        engine: Engine,
        prepare: Callable[[Program], Issue],
        stream: Callable[[], int] = int,
        max_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._engine, self._prepare, self._stream = engine, prepare, stream
        self._recorder = Recorder(engine)
        self._recording = threading.Lock()
        self.replays: SignatureCache[Replay] = SignatureCache(max_bytes)

    def run(self, plan: Callable[..., Any], geometry: Any, arrays: Sequence[Any | None], *options: Hashable) -> Any:
        """Return ``plan(engine, geometry, *arrays, *options)``, replayed where possible."""
        engine = self._engine
        forms = tuple([None if array is None else ArrayForm.of(engine, array) for array in arrays])
        key = (plan, geometry, forms, options, engine.device.id)
        replay = self.replays.get(key)
        if replay is None and all(form is None or form.aligned for form in forms):
            replay = self.replays.add(key, lambda: self.record(plan, geometry, forms, options))
        if replay is None:
            self.replays.see(key)
            return plan(engine, geometry, *arrays, *options)
        return replay.run(engine, self._stream(), arrays)

    def record(
        self,
        plan: Callable[..., Any],
        geometry: Any,
        forms: Sequence[ArrayForm | None],
        options: tuple[Hashable, ...],
    ) -> Replay:
        """Record a plan for the current device."""
        with self._recording:
            program, names = self._recorder.record(plan, geometry, forms, options)
        return Replay(program, names, self._prepare(program))


class _AddressRange:
    """Made-up addresses, in the form in which NumPy takes memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class _MemorylessArray(np.ndarray):
    """Array without elements; filling it is recorded."""

    recorder: Recorder

    def __array_finalize__(self, source: Any) -> None:
        self.recorder = getattr(source, "recorder", None)  # type: ignore[assignment]

    def fill(self, value: Any) -> None:
        assert value == 0 and (self.flags.c_contiguous or is_channels_last(self))
        self.recorder.record_fill(self)


class _MemorylessArrays:
    """Takes the place of `cupy` while a plan is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def empty(self, shape: tuple[int, ...], dtype: Any) -> _MemorylessArray:
        return self._recorder.new_array(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> _MemorylessArray:
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def broadcast_to(self, array: _MemorylessArray, shape: tuple[int, ...]) -> Any:
        return np.broadcast_to(array, shape, subok=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _compile_nothing(source: str, kernel: str, options: tuple[str, ...]) -> Launcher:
    raise AssertionError("kernels come from the engine that is recorded for")


@functools.cache
def pointer_fields(kind: type[ctypes.Structure]) -> tuple[int, ...]:
    """Return the byte offsets of the pointers in a parameter struct."""
    return tuple(_pointer_fields(kind, 0))


def _pointer_fields(kind: Any, start: int) -> Iterator[int]:
    if issubclass(kind, ctypes.Structure):
        for name, field, *_ in kind._fields_:
            yield from _pointer_fields(field, start + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointer_fields(kind._type_, start + i * ctypes.sizeof(kind._type_))
    elif kind is ctypes.c_void_p:
        yield start
