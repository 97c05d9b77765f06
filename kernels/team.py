"""How compiled kernels run: tasks on torch's own threads, single or as a program that no Python interrupts.

A task is a compiled `void task(void *arguments)`. Its arguments are 64-bit words: word 0 counts claimed work items, the
others are addresses, sizes and floats as the kernel's file says. Every thread of the team calls the task once, and it
claims items until none is left, so that a thread that loses its core for a while delays one item only.

The team is the OpenMP pool that torch computes with: a second pool would fight it for the cores (numba's own layers
took 50-90 us to start a task, this one about 2). Where torch brings no libgomp, tasks run on one thread.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import carray, float32, int64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled import forget_stale

forget_stale(Path(__file__).parent)
TASK = types.void(types.voidptr)
_ITEMS = (torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8)


@intrinsic
def claim(_typing, arguments):
    """The next work item, counted in word 0 of the task's arguments."""

    def generate(_context, builder, _signature, values):
        counter = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), generate


@intrinsic
def pointer(_typing, address):
    """An address as a pointer, for numba.carray."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@intrinsic
def _call(_typing, function, argument):
    """Calls the task at address `function`."""

    def generate(context, builder, _signature, values):
        void_pointer = cgutils.voidptr_t
        signature = ir.FunctionType(ir.VoidType(), [void_pointer])
        task = builder.inttoptr(values[0], signature.as_pointer())
        builder.call(task, [builder.inttoptr(values[1], void_pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _call_team(_typing, gomp_parallel, function, argument, num_threads):
    """GOMP_parallel: the task at address `function` on every thread of torch's pool."""

    def generate(context, builder, _signature, values):
        void_pointer, word = cgutils.voidptr_t, ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [void_pointer, void_pointer, word, word])
        parallel = builder.inttoptr(values[0], signature.as_pointer())
        function, argument = (builder.inttoptr(value, void_pointer) for value in values[1:3])
        builder.call(parallel, [function, argument, builder.trunc(values[3], word), ir.Constant(word, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@njit("float32[::1](int64, int64)", cache=True, nogil=True)
def floats(address, num_items):
    """The fp32 numbers at an address."""
    return carray(pointer(address), (num_items,), float32)


@njit("int64[::1](int64, int64)", cache=True, nogil=True)
def words(address, num_items):
    return carray(pointer(address), (num_items,), int64)


@njit("void(int64[:,::1], int64, int64, int64, int64)", cache=True, nogil=True)
def _run(calls, start, stop, gomp_parallel, num_threads):
    """calls[i] = (task, arguments, address of the number of tokens, fewest tokens that are worth a team)."""
    for i in range(start, stop):
        words(calls[i, 1], 1)[0] = 0
        if num_threads > 1 and words(calls[i, 2], 1)[0] >= calls[i, 3]:
            _call_team(gomp_parallel, calls[i, 0], calls[i, 1], num_threads)
        else:
            _call(calls[i, 0], calls[i, 1])


@dataclass(slots=True)
class Step:
    """What the kernels must know of a step besides their buffers: its arrays, all int64 but the page table.

    A program reads it through a fixed address, so `fill` before each run is all that changes from step to step.
    """

    words: np.ndarray = field(default_factory=lambda: np.zeros(7, dtype=np.int64))
    _arrays: tuple[torch.Tensor, ...] = ()

    def fill(
        self,
        num_tokens: int,
        *,
        positions_T: torch.Tensor | None = None,
        slots_T: torch.Tensor | None = None,
        rows_T: torch.Tensor | None = None,
        lengths_T: torch.Tensor | None = None,
        table_RL: torch.Tensor | None = None,
    ) -> None:
        """Word 0: number of tokens; 1 positions; 2 slots; 3 row of the table; 4 context length; 5 int32 table; 6 L."""
        arrays = (positions_T, slots_T, rows_T, lengths_T, table_RL)
        self._arrays = tuple(x for x in arrays if x is not None)  # kept alive until the next fill
        stride = 0 if table_RL is None else table_RL.stride(0)
        self.words[:] = (num_tokens, *(0 if x is None else x.data_ptr() for x in arrays), stride)


@dataclass(frozen=True, slots=True)
class Call:
    """A task bound to its arguments."""

    task: int  # address
    arguments: np.ndarray  # 64-bit words
    step: Step
    min_team_tokens: int  # with fewer tokens, waking the team costs more than it saves
    tensors: tuple[torch.Tensor, ...]  # whose memory the arguments point to


def bind(
    task: int, step: Step, *arguments: torch.Tensor | int | float | None, min_team_tokens: int = 1
) -> Call:
    """Words: counter, address of the step, then the arguments (the address of a tensor, 0 for None)."""
    packed = np.zeros(2 + len(arguments), dtype=np.int64)
    packed[1] = step.words.ctypes.data
    for i, argument in enumerate(arguments, start=2):
        match argument:
            case torch.Tensor():
                if argument.dtype not in _ITEMS or argument.stride(-1) != 1:
                    raise ValueError(f"kernels take rows of float32 or integers, got {argument.dtype}")
                packed[i] = argument.data_ptr()
            case float():
                packed.view(np.float64)[i] = argument
            case int():
                packed[i] = argument
    tensors = tuple(argument for argument in arguments if isinstance(argument, torch.Tensor))
    return Call(task, packed, step, min_team_tokens, tensors)


class Program:
    """Calls to run in order, each after all threads finished the one before."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)
        self._table = np.array(
            [
                (call.task, call.arguments.ctypes.data, call.step.words.ctypes.data, call.min_team_tokens)
                for call in calls
            ],
            dtype=np.int64,
        ).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Runs calls start..stop-1 on as many threads as torch uses."""
        stop = len(self._calls) if stop is None else stop
        num_threads = torch.get_num_threads() if _GOMP_PARALLEL else 1
        _run(self._table, start, stop, _GOMP_PARALLEL, num_threads)


def _find_gomp_parallel() -> int:
    """The address of torch's GOMP_parallel, or 0. The library is loaded already: torch depends on it."""
    for file in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        return ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


_GOMP_PARALLEL = _find_gomp_parallel()
