"""Compiled Triton kernels, started by CUDA's driver without Triton in between.

Triton takes 10 to 25 µs of Python to start a kernel whose compilation it knows; the layer starts a dozen of them.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

WARP = 32  # threads
SLOT = 8  # bytes; an argument has a slot of its own, however short it is
SCRATCH_POINTERS = 2  # Triton's kernels take them after their own arguments; null, where a kernel needs no scratch
CODES = {"u1": "B", "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Start(NamedTuple):
    """A kernel that Triton compiled, the numbers of programs (x, y, z), and its arguments. Pointers among them are
    placeholders, which every call replaces."""

    compiled: Any
    cells: tuple[int, int, int]
    arguments: Sequence[Any]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


_early = _Attribute(EARLY, 0, (ctypes.c_int * 16)(1))


class Queue:
    """A sequence of kernels that can be started many times, each time with other pointers."""

    def __init__(self, starts: Sequence[Start]):
        """Raises KeyError if a kernel takes arguments that only Triton's own launcher can pass; see `can_start`."""
        kinds = [_kinds(start) for start in starts]
        slots = (ctypes.c_uint64 * sum(len(each) + SCRATCH_POINTERS for each in kinds))()
        pointers = sum(kind.startswith("*") for each in kinds for kind, _ in each)  # their slots come first
        of_pointers, of_numbers = iter(range(pointers)), iter(range(pointers, len(slots)))
        self._configs, self._launches, every_place = [], [], []
        for (compiled, cells, _), arguments in zip(starts, kinds, strict=True):
            own = []
            for kind, value in arguments:
                own.append(next(of_pointers if kind.startswith("*") else of_numbers))
                if not kind.startswith("*"):
                    struct.pack_into(CODES[kind], slots, SLOT * own[-1], value)
            own += [next(of_numbers) for _ in range(SCRATCH_POINTERS)]
            places = (ctypes.c_void_p * len(own))(*(ctypes.addressof(slots) + SLOT * slot for slot in own))
            config = _config(compiled, cells)
            self._launches.append((ctypes.addressof(config), compiled.function, ctypes.addressof(places), None))
            self._configs.append(config)
            every_place.append(places)
        self._kept = starts, slots, every_place  # keeps alive what the addresses above point to, and the kernels' code
        self._pointers = np.ctypeslib.as_array(slots).view(np.int64)[:pointers]
        self._lock = threading.Lock()  # one call at a time uses the slots
        self._stream: int | None = None

    def __call__(self, pointers: Any, stream: int) -> None:
        """Start the kernels on a stream of the current device.

        Args:
            pointers: the addresses for all kernels' pointers, in the order of starts and arguments.
            stream: CUDA's handle of the stream.

        Raises:
            RuntimeError: CUDA's driver reports an error; the message gives its number.
        """
        launch = _library().cuLaunchKernelEx
        with self._lock:
            self._pointers[:] = pointers
            if stream != self._stream:
                for config in self._configs:
                    config.stream = stream
                self._stream = stream
            for arguments in self._launches:
                error = launch(*arguments)
                if error == NO_CONTEXT:  # a thread's first call, such as autograd's
                    _take_context(torch.cuda.current_device())
                    error = launch(*arguments)
                if error:
                    raise RuntimeError(f"CUDA's driver could not start a kernel: error {error} (a CUresult)")


def can_start(start: Start) -> bool:
    """Whether a Queue can start it: a CUDA kernel without scratch memory or clusters, with arguments of known kinds."""
    compiled = start.compiled
    metadata = getattr(compiled, "metadata", None)
    signature = getattr(getattr(compiled, "src", None), "signature", None)
    if torch.version.cuda is None or metadata is None or not isinstance(getattr(compiled, "function", None), int):
        return False
    special = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")
    if any(getattr(metadata, name, 1) for name in special) or getattr(metadata, "num_ctas", 0) != 1:
        return False
    if signature is None or len(signature) != len(start.arguments):
        return False
    return all(kind == "constexpr" or kind.startswith("*") or kind in CODES for kind in signature.values())


def _kinds(start: Start) -> list[tuple[str, Any]]:
    """The kinds, in Triton's names, and the values of the arguments that are passed, without compiled-in constants."""
    signature = start.compiled.src.signature.values()
    return [(kind, value) for kind, value in zip(signature, start.arguments, strict=True) if kind != "constexpr"]


def _config(compiled: Any, cells: tuple[int, int, int]) -> _Config:
    metadata = compiled.metadata
    config = _Config(cells, (metadata.num_warps * WARP, 1, 1), metadata.shared)
    if getattr(metadata, "launch_pdl", False):
        config.attributes, config.attribute_count = ctypes.addressof(_early), 1
    return config


def _take_context(device: int) -> None:
    """Let this thread use the device's primary context, as all others do."""
    context = ctypes.c_void_p()
    _library().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device))
    _library().cuCtxSetCurrent(context)


@functools.cache
def _library() -> Any:
    """CUDA's driver. PyDLL, because releasing and retaking the interpreter's lock would cost more than a launch."""
    library = ctypes.PyDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuLaunchKernelEx.restype = ctypes.c_int
    return library
