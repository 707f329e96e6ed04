"""Time and check every implementation of neighborhood attention, side by side.

    python -m t5kernels.tools.neighborhoods --out FILE.json [--case NAME ...]

A time is the median of replays of a CUDA graph, in bfloat16. The check compares outputs and gradients with plain
PyTorch in float64. Errors may be at most twice those of plain PyTorch in bfloat16.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5kernels.neighborhood.api import neighborhood_attention
from t5kernels.tools.bench import ALLOWED, Run, errors, surroundings, timings, write

NAMES = ("out", "d_q", "d_k", "d_v")
IMPLEMENTATIONS = ("triton", "flex", "natten")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer of a real model: batch, sides of the token grid, heads, head width, and the window's side."""

    name: str
    images: int
    rows: int
    columns: int
    heads: int
    width: int
    window: int = 5


CASES = (
    Case(name="dinov2-s-1036", images=1, rows=74, columns=74, heads=6, width=64),
    Case(name="dinov2-s-1036-nat3", images=1, rows=74, columns=74, heads=6, width=64, window=3),
    Case(name="dinov2-s-518", images=16, rows=37, columns=37, heads=6, width=64),
    Case(name="sd35-1024", images=2, rows=64, columns=64, heads=24, width=64),
    Case(name="so400m", images=16, rows=32, columns=32, heads=16, width=72),
    Case(name="flux", images=1, rows=64, columns=64, heads=24, width=128),
)


def draw(case: Case, device: str = "cuda") -> tuple[list[Tensor], Tensor]:
    """q, k, v (B, H, N, D), views of one projection, in bfloat16, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    size = (case.images, case.rows * case.columns)
    qkv = torch.randn(*size, 3, case.heads, case.width, generator=generator, device=device, dtype=torch.bfloat16)
    d_out = torch.randn(*size, case.heads, case.width, generator=generator, device=device, dtype=torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in qkv.transpose(1, 3).unbind(2)]
    return leaves, d_out.transpose(1, 2)


def run_of(case: Case, impl: str, leaves: list[Tensor], d_out: Tensor) -> Run:
    call = partial(neighborhood_attention, *leaves, rows=case.rows, columns=case.columns, window=case.window, impl=impl)
    return Run(lambda: (call(),), leaves, (d_out,))


def results(run: Run) -> dict[str, Tensor]:
    return dict(zip(NAMES, run.step(), strict=True))


def measure(case: Case, milliseconds: int = 20) -> dict[str, Any]:
    """Times and errors by implementation; for one that cannot run the case, the reason."""
    leaves, d_out = draw(case)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = results(run_of(case, "reference", exact_leaves, d_out.double()))
    plain = errors(results(run_of(case, "reference", leaves, d_out)), exact)
    row: dict[str, Any] = {"case": asdict(case), "plain": plain, "runs": {}}
    for impl in IMPLEMENTATIONS:
        run = run_of(case, impl, leaves, d_out)
        try:
            error = errors(results(run), exact)
        except (RuntimeError, ValueError) as reason:
            row["runs"][impl] = {"cannot": str(reason).splitlines()[0]}
            continue
        ratio = max((error[name] / plain[name] for name in NAMES), key=lambda x: math.inf if math.isnan(x) else x)
        row["runs"][impl] = timings(run, milliseconds) | {"error_by_plain": ratio, "correct": ratio <= ALLOWED}
    return row


def line(row: dict[str, Any], impl: str) -> str:
    run = row["runs"][impl]
    if "cannot" in run:
        return f"{impl:<8} cannot run this case: {run['cannot']}"
    verdict = "" if run["correct"] else "WRONG, "
    return (
        f"{impl:<8}{run['forward_ms']:8.3f} ms forward{run['both_ms']:8.3f} ms with backward  "
        f"{verdict}error {run['error_by_plain']:.2f}x plain"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, after every case")
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="only these cases")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; run this on the card to be measured")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if case.name in (options.case or [case.name]):
            rows.append(measure(case))
            write(options.out, {**surroundings(), "cases": rows})
            print(case.name, *(line(rows[-1], impl) for impl in IMPLEMENTATIONS), sep="\n", flush=True)
    if not all(run.get("correct", True) for row in rows for run in row["runs"].values()):
        raise SystemExit("t5kernels.tools.neighborhoods: a result is further from float64 than allowed")


if __name__ == "__main__":
    main()
