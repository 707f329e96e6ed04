"""Launches that repeat: what depends only on shapes is worked out once.

Finding tiles, grids and strides and allocating a dozen tensors takes Python longer than a card needs for the kernels
of a layer. A plan holds the launches of one call, and where their tensors lie: among the call's inputs, among its
outputs, or in one workspace, in which tensors that are never needed at the same time share their place.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t5kernels import launch
from t5kernels.driver import Queue

LINE = 256  # bytes; tensors in a workspace begin at multiples of it
EVERYTHING = 1 << 62  # bytes, more than there are
MOST_PLANS = 1000  # a limit for programs whose sizes never repeat
# What a call that can be planned may do beside launches: allocate memory, and make views of it.
ALLOCATIONS = {f"aten::{name}" for name in ("empty.memory_format", "new_empty", "empty_strided", "new_empty_strided")}
VIEWS = {"transpose.int", "view", "slice.Tensor", "select.int", "unbind.int", "squeeze.dim", "unsqueeze", "as_strided"}
MEMORY_ONLY = ALLOCATIONS | {f"aten::{name}" for name in VIEWS} | {"aten::alias", "aten::detach"}


class Spot(NamedTuple):
    """A place in memory: `offset` bytes from the start of a base, which is an input, an output or the workspace."""

    base: int
    offset: int


class Place(NamedTuple):
    """Where an argument of a launch lies; see Spot."""

    argument: int
    base: int
    offset: int
    dtype: torch.dtype


class Step(NamedTuple):
    """One launch: what runs the kernel on its grid, and its arguments, of which `places` are filled in."""

    run: Callable
    arguments: list[Any]
    places: list[Place]


class Plan:
    """The launches of a call, and what it allocates."""

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype]],
        workspace_bytes: int,
        queue: Queue | None,
    ):
        """
        Args:
            outputs: size, stride and dtype of each.
            queue: the steps for CUDA's driver, if it can start them all.
        """
        self.steps, self.outputs, self.workspace_bytes, self.queue = steps, outputs, workspace_bytes, queue
        places = [place for step in steps for place in step.places]
        self._bases = np.array([place.base for place in places], np.int64)
        self._offsets = np.array([place.offset for place in places], np.int64)

    def __call__(self, inputs: Sequence[Tensor | None], addresses: Sequence[int]) -> tuple[Tensor, ...]:
        """Make the outputs. addresses: where the inputs begin."""
        first = next(t for t in inputs if t is not None)
        outputs = tuple(first.new_empty_strided(size, stride, dtype=dtype) for size, stride, dtype in self.outputs)
        workspace = first.new_empty(self.workspace_bytes, dtype=torch.uint8)
        with torch.cuda.device_of(first):
            if self.queue is None:
                stream = {} if launch.INTERPRETED else {"stream": launch.stream_of(first)}
                self._run((*inputs, *outputs, workspace), stream)
            else:
                starts = np.array([*addresses, *(t.data_ptr() for t in outputs), workspace.data_ptr()], np.int64)
                self.queue(starts[self._bases] + self._offsets, launch.stream_of(first))
        return outputs

    def _run(self, bases: Sequence[Tensor | None], stream: dict[str, int]) -> None:
        for run, arguments, places in self.steps:
            filled = arguments.copy()
            for argument, base, offset, dtype in places:
                start = bases[base]
                assert start is not None
                # The interpreter takes no bare addresses.
                at = _tensor_at(start, offset, dtype) if launch.INTERPRETED else start.data_ptr() + offset
                filled[argument] = at
            run(*filled, **stream)


_plans: dict[tuple, Plan | None] = {}  # None: such a call cannot be planned


def planned(run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], *numbers: Any) -> tuple:
    """`run(*inputs, *numbers)`, whose launches are remembered for the next call with inputs of the same layout.

    `run` writes only to new tensors, and what it does depends only on the layout of its inputs (sizes, strides, dtypes,
    device) and on the numbers. A call that also computes with PyTorch is never planned.
    """
    addresses = [0 if t is None else t.data_ptr() for t in inputs]
    aligned = [address % launch.ALIGNMENT for address in addresses]
    layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs]
    key = (run, numbers, *aligned, *layouts)
    plan = _plans.get(key)
    if plan is not None:
        return plan(inputs, addresses)
    if key in _plans:
        return run(*inputs, *numbers)
    with _recorded() as (launches, computes):
        outputs = run(*inputs, *numbers)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = None if computes else _plan_of(launches, inputs, outputs)
    return outputs


class _NotesComputation(TorchDispatchMode):
    """Collects the names of PyTorch's operators that do more than handle memory."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() not in MEMORY_ONLY:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _recorded() -> Iterator[tuple[list[launch.Launch], list[str]]]:
    """Within this context, launches and PyTorch's computations are noted. All tensors are kept, so that their addresses
    differ."""
    launches: list[launch.Launch] = []
    launch.noted.launches = launches
    try:
        with _NotesComputation() as computation:
            yield launches, computation.names
    finally:
        del launch.noted.launches


def _plan_of(launches: list[launch.Launch], inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Plan | None:
    """The plan of a call that made these launches; None if a tensor may be either of two inputs, or part of one."""
    given = {t.data_ptr(): base for base, t in enumerate(inputs) if t is not None and t.numel()}
    if len(given) < sum(t is not None and t.numel() > 0 for t in inputs):
        return None
    own = {base: t for base, t in enumerate(outputs, len(inputs)) if t.numel()}
    known = {_storage(t) for t in inputs if t is not None}
    others, workspace_bytes = _share_memory(launches, own, known, workspace=len(inputs) + len(outputs))
    spots = {_storage(t): Spot(base, _storage(t) - t.data_ptr()) for base, t in own.items()} | others | _alone(inputs)

    steps = []
    for run, arguments, _ in launches:
        places, numbers = [], [None if isinstance(a, Tensor) else a for a in arguments]
        for index, tensor in enumerate(arguments):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.data_ptr() in given:
                spot = Spot(given[tensor.data_ptr()], 0)
            elif _storage(tensor) in spots:
                base, start = spots[_storage(tensor)]
                spot = Spot(base, start + tensor.data_ptr() - _storage(tensor))
            else:
                return None
            places.append(Place(index, *spot, tensor.dtype))
        steps.append(Step(run, numbers, places))
    specs = [(t.shape, t.stride(), t.dtype) for t in outputs]
    driven = [each.start for each in launches if each.start is not None]
    return Plan(steps, specs, workspace_bytes, Queue(driven) if len(driven) == len(steps) else None)


def _alone(inputs: Sequence[Tensor | None]) -> dict[int, Spot]:
    """The start of every storage that only one input uses, so that a part of the storage is a part of that input."""
    storages = [_storage(t) for t in inputs if t is not None]
    return {
        _storage(t): Spot(base, _storage(t) - t.data_ptr())
        for base, t in enumerate(inputs)
        if t is not None and t.numel() and storages.count(_storage(t)) == 1
    }


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's memory; views of one another share it."""
    return tensor.untyped_storage().data_ptr()


class _Tenant(NamedTuple):
    """A storage in a base: its bytes from `start` to before `end`, for the launches from `since` to before `until`."""

    start: int
    end: int
    since: int
    until: int


def _share_memory(
    launches: list[launch.Launch], outputs: dict[int, Tensor], inputs: Collection[int], workspace: int
) -> tuple[dict[int, Spot], int]:
    """Where the storages that are neither outputs nor inputs begin, and the bytes of the workspace.

    Each lies at the first place that is free from the first launch that uses it to the last: in an output that no
    launch uses until then, or else in the workspace.

    Args:
        outputs: by base. inputs: their storages. workspace: its base.
    """
    turns: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for turn, (_, arguments, _) in enumerate(launches):
        for tensor in arguments:
            if isinstance(tensor, Tensor) and _storage(tensor) not in inputs:
                turns.setdefault(_storage(tensor), []).append(turn)
                sizes[_storage(tensor)] = launch.ceil_div(tensor.untyped_storage().nbytes(), LINE) * LINE
    tenants: dict[int, list[_Tenant]] = {}
    for base, output in outputs.items():
        if output.data_ptr() == _storage(output) in turns:
            room = output.untyped_storage().nbytes() // LINE * LINE
            itself = _Tenant(0, room, turns[_storage(output)][0], len(launches))
            tenants[base] = [itself, _Tenant(room, EVERYTHING, 0, len(launches))]
    tenants[workspace] = []

    spots: dict[int, Spot] = {}
    own = {_storage(output) for output in outputs.values()}
    for storage in (each for each in turns if each not in own):
        since, until = turns[storage][0], turns[storage][-1] + 1
        for base, others in tenants.items():
            start = _first_fit(sizes[storage], [each for each in others if each.since < until and since < each.until])
            if start is not None:
                others.append(_Tenant(start, start + sizes[storage], since, until))
                spots[storage] = Spot(base, start)
                break
    return spots, max((tenant.end for tenant in tenants[workspace]), default=0)


def _first_fit(size: int, taken: list[_Tenant]) -> int | None:
    """The first byte from which `size` bytes are free; None if everything is taken."""
    start = 0
    for tenant in sorted(taken):
        if start + size <= tenant.start:
            break
        start = max(start, tenant.end)
    return start if start < EVERYTHING else None


def _tensor_at(base: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins `offset` bytes after the start of another."""
    storage = base.untyped_storage()
    start = (base.data_ptr() - storage.data_ptr() + offset) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=base.device).set_(storage, start, (1,), (1,))
