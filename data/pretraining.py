"""Training a small denoiser from nothing on one device, for a fixed time: what made sd35-micro and dit-micro.

Unlike t5lib.training, which fine-tunes for a number of steps, time is the budget here: the learning rate falls with the
clock. A step's batch depends on the seed and its number alone, so a run that was stopped goes on as if it had not been.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from t5lib.training.graphs import RecordedPasses
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file

T = TypeVar("T")
LOG_EVERY = 50  # steps; the loss is read from the device no more often
PRINT_EVERY = 20.0  # seconds
SAVE_EVERY = 60.0


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How long and how fast.

    Attributes:
        minutes, steps: whichever ends first. Time in `untimed` steps, and in work done before, does not count.
        lr: reached after `warmup` steps, falling linearly to zero in the last `decay` of the budget (0 to 1).
        ema: of the averaged weights, which are the result; in early steps less, (1 + n) / (10 + n).
        clip: largest norm of the gradient.
        untimed: first steps after every start, in which torch.compile works.
        threads: that make batches ahead of the step they are for; 0 makes each when it is needed.
        graphs: on CUDA, record each pass as a CUDA graph (t5lib.training.graphs). Batches are then tensors by name.
    """

    minutes: float
    steps: int = 1_000_000
    lr: float = 1e-3
    warmup: int = 300
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    untimed: int = 0
    threads: int = 0
    graphs: bool = False

    def __post_init__(self):
        if self.minutes <= 0 or self.steps < 1 or not 0 < self.decay <= 1 or not 0 <= self.ema < 1:
            raise T5Error(
                f"pretrain: minutes {self.minutes}, steps {self.steps}, decay {self.decay}, ema {self.ema}; expected "
                "minutes > 0, steps >= 1, 0 < decay <= 1 and 0 <= ema < 1"
            )

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step that begins after `seconds` of training."""
        done = max(step / self.steps, seconds / (60 * self.minutes))
        return self.lr * min(1.0, (step + 1) / self.warmup, max(0.0, 1 - done) / self.decay)


@dataclass(kw_only=True)
class Record:
    """What a run did. `losses` are [step, mean over the LOG_EVERY steps before]; `finished` is false after a stop."""

    steps: int = 0
    seconds: float = 0.0
    untimed_seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    finished: bool = False


def pretrain(
    name: str,
    model: nn.Module,
    batch_at: Callable[[int], T],
    loss: Callable[[T], Tensor],
    config: PretrainConfig,
    checkpoint: Path,
    stop: float = float("inf"),
) -> Record:
    """Train all parameters of `model` that require a gradient; at the end it holds the averaged weights.

    Args:
        batch_at: the batch of a step, from its number and the seed alone; called in threads when there are any.
        loss: of a batch, a scalar; on CUDA under bf16 autocast.
        checkpoint: file of the state, written every minute and at the end. A finished one is loaded, not trained.
        stop: value of time.monotonic() from which on the run saves its state and returns unfinished.

    Raises:
        T5Error: the loss is not finite.
    """
    run = _Run(name, model, loss, config, checkpoint)
    if checkpoint.exists():
        run.load()
    if not run.record.finished:
        with _made_ahead(batch_at, run.record.steps, config.threads) as batches:
            while not run.over() and time.monotonic() < stop:
                run.step(next(batches))
        run.record.finished = run.over()
        run.save()
    if run.record.finished:
        run.take_average()
    return run.record


def zero_gates(model: nn.Module, *last: nn.Linear) -> None:
    """Start every block as the identity, as DiT does: adaptive norms modulate nothing, the `last` layers give zero."""
    norms = [module.linear for module in model.modules() if type(module).__name__.startswith("AdaLayerNorm")]
    for layer in (*norms, *last):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class _Run:
    """A model in training: its state, on disk and in memory."""

    def __init__(self, name: str, model: nn.Module, loss: Callable, config: PretrainConfig, checkpoint: Path):
        self.name, self.model, self.loss, self.config, self.checkpoint = name, model, loss, config, checkpoint
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.cuda = self.weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=self.cuda
        )
        self.passes = RecordedPasses(model) if config.graphs and self.cuda else None
        self.record = Record()
        self.recent: list[Tensor] = []
        self.here = 0  # steps since this start
        self.clock = self.spoken = self.saved = time.monotonic()

    def over(self) -> bool:
        return self.record.steps >= self.config.steps or self.record.seconds >= 60 * self.config.minutes

    def step(self, batch: Any) -> None:
        self.optimizer.param_groups[0]["lr"] = self.config.rate(self.record.steps, self.record.seconds)
        loss = self.passes(self._learn, batch) if self.passes else self._learn(batch)
        nn.utils.clip_grad_norm_(self.weights, self.config.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        kept = min(self.config.ema, (1 + self.record.steps) / (10 + self.record.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - kept)
        self.recent.append(loss.clone())  # the next replay of a graph writes to the same place
        self.record.steps += 1
        self.here += 1
        self._count_time()
        if len(self.recent) == LOG_EVERY or self.over():
            self._log()

    def _learn(self, batch: Any) -> Tensor:
        with torch.autocast(self.weights[0].device.type, torch.bfloat16, enabled=self.cuda):
            loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def _count_time(self) -> None:
        untimed = self.here <= self.config.untimed
        if untimed and self.cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        if untimed:
            self.record.untimed_seconds += now - self.clock
        else:
            self.record.seconds += now - self.clock
        self.clock = now

    def _log(self) -> None:
        mean = float(torch.stack(self.recent).mean())
        self.recent = []
        if not mean < float("inf"):
            raise T5Error(f"{self.name}: the loss is {mean} at step {self.record.steps}; try a lower learning rate")
        self.record.losses.append([self.record.steps, mean])
        now = time.monotonic()
        if now - self.spoken > PRINT_EVERY or self.over():
            self.spoken = now
            print(f"{self.name}: step {self.record.steps}, {self.record.seconds:.0f} s, loss {mean:.4f}", flush=True)
        if now - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        state = {
            "weights": self.weights,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "record": vars(self.record),
        }
        with atomic_file(self.checkpoint) as file:
            torch.save(state, file)
        self.saved = time.monotonic()

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.weights[0].device, weights_only=True)
        found = [tuple(weight.shape) for weight in state["weights"]]
        if found != [tuple(weight.shape) for weight in self.weights]:
            raise T5Error(f"{self.checkpoint} is of another model; delete it to train from the beginning")
        self._put(state["weights"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.record = Record(**state["record"])
        print(f"{self.name}: goes on at step {self.record.steps} of {self.checkpoint}", flush=True)

    def take_average(self) -> None:
        self._put(self.average)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


@contextmanager
def _made_ahead(make: Callable[[int], T], first: int, threads: int) -> Iterator[Iterator[T]]:
    """make(first), make(first + 1), …; up to two a thread are in the making while one is used."""
    if not threads:
        yield map(make, itertools.count(first))
        return
    pool = ThreadPoolExecutor(threads)

    def results() -> Iterator[T]:
        numbers = itertools.count(first)
        waiting = deque(pool.submit(make, next(numbers)) for _ in range(2 * threads))
        while True:
            yield waiting.popleft().result()
            waiting.append(pool.submit(make, next(numbers)))

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
