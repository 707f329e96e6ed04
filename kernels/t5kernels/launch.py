# pyright: reportGeneralTypeIssues=false
# (It takes tl.range, over which a kernel loops, for something that cannot be iterated.)
"""What every launch of a Triton kernel needs: its tile, the programs that share its tokens, the sum of their results.

An op imports this module only when it considers its kernels, since Triton takes a while to import and exists on Linux
only. Shapes: B batch, H heads, N tokens, D head width.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from t5kernels.driver import Queue, Start, can_start
from t5kernels.precision import autocast_dtype
from t5kernels.tokens import COUNTS, after_previous

LARGEST_HEAD = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter's machine is small, so that tests split their tokens.
INTERPRETED_PROGRAMS = 8
# Bytes of shared memory that a program may have: on all cards that the tiles are made for, and on an H100.
LEAST_SHARED, H100_SHARED = 160 * 1024, 227 * 1024
FIRST_EARLY = 9  # the first major version of cards on which a kernel's programs may come up before the last one is done
# A program loads weights and writes sums that are added later; that costs it as much as so many blocks of tokens.
OVERHEAD = 3
MOST_CHUNKS = 32
ALIGNMENT = 16  # bytes; to such pointers Triton compiles wider reads and writes
MOST_KNOWN = 10_000  # a limit to `_known` for programs whose sizes never repeat


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        hidden: columns of the inner model at a time; 0 where a kernel has none.
        block: tokens at a time.
        warps, stages: as Triton takes them.
        resident: programs that a multiprocessor holds at once; more would only mean more partial sums.
        registers: the most that the compiler may use for a thread, where it would otherwise take a few too many for
            the resident programs.
    """

    hidden: int = 0
    block: int
    warps: int
    stages: int = 1
    resident: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """The options of a launch, as Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


SUM_TILE = Tile(block=1024, warps=4)  # a program adds so many numbers of the partial sums


@triton.jit(do_not_specialize=COUNTS)
def add_kernel(parts, sums, count, numbers, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Write sums (programs, numbers): parts (programs, count, numbers) added over `count` in order.

    The launch grid is (programs, blocks of the numbers).
    """
    after_previous(EARLY)
    program = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts += program * count * numbers + number
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for _ in tl.range(count, num_stages=4):
        total += tl.load(parts, number < numbers, other=0.0)
        parts += numbers
    tl.store(sums + program * numbers + number, total, number < numbers)


# TRITON_INTERPRET decided it when the kernels were defined; interpreted kernels take CPU tensors.
INTERPRETED = not isinstance(add_kernel, triton.runtime.JITFunction)


def obstacle(tokens: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take tokens (B, H, N, D) and inner weights, as `Candidate.obstacle` says it, or None."""
    dtypes = [autocast_dtype(t) for t in tokens]
    remedy = _remedy(tokens, weights, dtypes)
    if remedy is None:
        return None
    arguments = ", ".join(str(dtype) for dtype in (*dtypes, *(w.dtype for w in weights)))
    return f"with {arguments} on {tokens[0].device}; {remedy}"


def _remedy(tokens: Sequence[Tensor], weights: Sequence[Tensor], dtypes: list[torch.dtype]) -> str | None:
    """What the caller can do so that the kernels take the arguments; None where they take them."""
    device, every_dtype = tokens[0].device, (*dtypes, *(w.dtype for w in weights))
    if any(t.device != device for t in (*tokens, *weights)):
        return f"expected everything on one device, got {sorted({str(t.device) for t in (*tokens, *weights)})}"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return "expected CUDA tensors (TRITON_INTERPRET=1 emulates them on a CPU); use 'reference'"
    if any(dtype != dtypes[0] for dtype in dtypes) or any(dtype not in DTYPES for dtype in every_dtype):
        return f"expected tokens of one dtype, all of {DTYPES}; convert them, or use 'reference'"
    if _transformed():
        return "expected no transform of torch.func, for which the kernels have no rules; use 'reference'"
    if INTERPRETED and torch.bfloat16 in every_dtype:
        return "expected float16 or float32, since Triton's interpreter is wrong in bfloat16"
    if tokens[0].shape[3] > LARGEST_HEAD or any(t.numel() == 0 for t in tokens):
        shapes = [tuple(t.shape) for t in tokens]
        return f"expected at least one token and heads up to {LARGEST_HEAD} wide, got {shapes}; use 'reference'"
    return None


def _transformed() -> bool:
    """Whether a transform of torch.func is at work.

    A custom op without rules for a transform fails under `grad`, and under `jvp` it silently loses its tangents.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class Launch(NamedTuple):
    """One launch.

    Attributes:
        run: runs the kernel on its grid; it is called with the arguments.
        start: the same for CUDA's driver, if it can start the kernel.
    """

    run: Callable
    arguments: tuple[Any, ...]
    start: Start | None = None


class _Known(NamedTuple):
    """A kernel that has been launched on a grid: `Launch` without arguments, and a queue of only this launch."""

    run: Callable
    start: Start | None
    queue: Queue | None


_known: dict[tuple, _Known] = {}  # by what `launch` is called with, pointers aside
noted = threading.local()  # if it has the attribute `launches`, a list, that gets every Launch of this thread


def launch(kernel: Any, grid: tuple[int, int] | tuple[int, int, int], x: Tensor, tile: Tile, *arguments: Any) -> None:
    """Run a kernel on the device of x, with the options of its tile and all of its arguments but the last, EARLY.

    From the H100 on, launches overlap. Triton would look up in every call which compiled version of the kernel fits,
    which takes longer than the launch itself; here that is remembered.
    """
    early = x.is_cuda and _card(x.device).major >= FIRST_EARLY  # see tokens.after_previous
    arguments, cells = (*arguments, early), grid if len(grid) == 3 else (*grid, 1)
    # What Triton chooses by: types, values, and whether pointers are aligned.
    kinds = [(a.dtype, a.data_ptr() % ALIGNMENT) if isinstance(a, Tensor) else a for a in arguments]
    key = (id(kernel), tile, x.device, cells, *kinds)
    known = _known.get(key)
    with torch.cuda.device_of(x):
        if known is None:
            known = _first_launch(kernel, cells, tile, arguments)
            if not INTERPRETED:
                if len(_known) >= MOST_KNOWN:
                    _known.clear()
                _known[key] = known
        elif known.queue is None:
            known.run(*arguments)
        else:
            known.queue([a.data_ptr() for a in arguments if isinstance(a, Tensor)], stream_of(x))
    if hasattr(noted, "launches"):
        noted.launches.append(Launch(known.run, arguments, known.start))


def _first_launch(kernel: Any, cells: tuple[int, int, int], tile: Tile, arguments: tuple[Any, ...]) -> _Known:
    if INTERPRETED:
        with _disable_current_modes():  # whatever watches the op shall not see the interpreter copy tensors
            kernel[cells](*arguments)
        return _Known(kernel[cells], None, None)
    pdl = {"launch_pdl": True} if arguments[-1] else {}
    compiled = kernel[cells](*arguments, **tile.options, **pdl)
    start = Start(compiled, cells, [None if isinstance(a, Tensor) else a for a in arguments])
    if not can_start(start):
        return _Known(compiled[cells], None, None)
    return _Known(compiled[cells], start, Queue([start]))


def stream_of(x: Tensor) -> int:
    """The stream on which kernels run on the device of x."""
    return triton.runtime.driver.active.get_current_stream(x.device.index)


def padded_width(head_dim: int) -> int:
    """The head width as kernels see it that take a power of two."""
    return max(32, 1 << (head_dim - 1).bit_length())


def padded_to(widths: Iterable[int], head_dim: int) -> int:
    """The smallest of the widths, the keys of a table of tiles, into which a head fits."""
    return min(width for width in widths if width >= head_dim)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's own function takes microseconds, of which a launch has few."""
    return -(-a // b)


def lacks_shared_memory(x: Tensor, needed: int) -> bool:
    """Whether x is on a card with less than `needed` bytes of shared memory per program, or with an unknown amount."""
    return x.is_cuda and getattr(_card(x.device), "shared_memory_per_block_optin", 0) < needed


@functools.cache
def _card(device: torch.device) -> Any:
    """The driver's properties of a card; the driver is asked once, because every launch needs them."""
    return torch.cuda.get_device_properties(device)


def _programs(x: Tensor, tile: Tile) -> int:
    """How many programs the device holds at once."""
    if not x.is_cuda:
        return INTERPRETED_PROGRAMS
    return tile.resident * _card(x.device).multi_processor_count


def chunks_of(parts: Sequence[Tensor], tile: Tile, heads: int, images: int = 1) -> tuple[int, list[int], int]:
    """How the tokens (B, H, N, D) of a sequence's parts are shared out: tokens a chunk, chunks of each part, and images
    a program."""
    blocks = tuple(ceil_div(x.shape[2], tile.block) for x in parts)
    blocks_a_chunk, images = _shares(blocks, heads, images, _programs(parts[0], tile))
    return blocks_a_chunk * tile.block, [ceil_div(each, blocks_a_chunk) for each in blocks], images


def lying_alike(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tokens of the parts of a sequence; copies, where the channels of one do not lie as those of the first."""
    if all(x.stride(3) == parts[0].stride(3) for x in parts):
        return parts
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]  # heads may lie side by side, and still do


def blocks_of(x: Tensor, tile: Tile, heads: int, *blocks: int) -> int:
    """How many blocks of a head a program takes, of the `blocks` in each part of a sequence."""
    return _shares(blocks, heads, 1, _programs(x, tile))[0]


@functools.cache
def _shares(blocks: tuple[int, ...], heads: int, images: int, programs: int) -> tuple[int, int]:
    """Blocks of tokens and images that a program takes so that the last one is done soonest, with few programs.

    `blocks`: of every part of a sequence; no program takes some of two.

    The cache is keyed on sizes. That is safe because kernels are launched inside custom ops, which torch.compile and
    torch.export do not trace: here sizes are always numbers.
    """

    def finish(share: tuple[int, int]) -> tuple[int, int]:
        count = heads * sum(ceil_div(each, share[0]) for each in blocks) * ceil_div(images, share[1])
        return ceil_div(count, programs) * (share[0] * share[1] + OVERHEAD), count

    most = max(blocks)
    blocks_at_once = {ceil_div(most, chunks) for chunks in range(1, min(most, MOST_CHUNKS) + 1)}
    return min(itertools.product(blocks_at_once, range(1, images + 1)), key=finish)


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def sum_over_chunks(parts: Tensor) -> Tensor:
    """Partial sums (programs, chunks, ...) added over the chunks, in a fixed order."""
    if parts.shape[1] == 1:
        return parts.squeeze(1)
    sums = parts.new_empty(parts.shape[0], *parts.shape[2:])
    numbers = sums[0].numel()
    grid = (parts.shape[0], ceil_div(numbers, SUM_TILE.block))
    launch(add_kernel, grid, parts, SUM_TILE, parts, sums, parts.shape[1], numbers, SUM_TILE.block)
    return sums


def like_tokens(x: Tensor) -> Tensor:
    """Empty tokens (B, H, N, D) that lie in memory as (B, N, H, D), so that merging the heads is a view."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)
