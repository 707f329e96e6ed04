"""Times of the `ttt` kernels beside cuDNN attention and the compiled reference, each beside its correctness check.

    python -m t5kernels.bench --out FILE.json [--case B,N,H,D ...] [--fast]

One CUDA device, bfloat16, medians by triton.testing.do_bench; everything in one run, on the same inputs: views of one
(B, N, 3, H, D) projection. Only the op is timed: key norm, convolution and projections stand outside of it.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from t5kernels.ttt.api import ttt

NOTE = "the op alone: key norm and convolution are outside, in no column"
NAMES = ("out", "dq", "dk", "dv", "dw1", "dw2", "dw3")
# A kernel may be this many times as far from float64 as plain PyTorch in the same dtype.
ALLOWED = 2.0


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    images: int
    tokens: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"B{self.images}-N{self.tokens}-H{self.heads}-D{self.width}"


CASES = (Case(2, 4096, 24, 64), Case(2, 16384, 24, 64), Case(128, 197, 6, 64), Case(16, 1024, 16, 72))


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients: q, k, v (B, H, N, D) and three inner weights; and the gradient of the output."""

    tokens: tuple[Tensor, Tensor, Tensor]
    weights: tuple[Tensor, Tensor, Tensor]
    d_out: Tensor

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)

        qkv = normal(case.images, case.tokens, 3, case.heads, case.width).to(dtype)
        matrix = (case.heads, case.width, case.width)
        weights = tuple((normal(*matrix) * case.width**-0.5).to(dtype).requires_grad_() for _ in range(3))
        tokens = tuple(t.detach().requires_grad_() for t in qkv.transpose(1, 3).unbind(2))
        d_out = normal(case.images, case.tokens, case.heads, case.width).to(dtype).transpose(1, 2)
        return cls(tokens, weights, d_out)

    def double(self) -> "Inputs":
        tokens, weights = (
            tuple(t.detach().double().requires_grad_() for t in part) for part in (self.tokens, self.weights)
        )
        return Inputs(tokens, weights, self.d_out.double())


def layer(impl: str) -> Callable[..., Tensor]:
    """The op as the method uses it: `run(q, k, v, w1, w2, w3)`."""

    def run(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        scale = q.shape[3] ** -0.5 / k.shape[2]
        return ttt(q, k, v, weights, inner="swiglu", scale=scale, impl=impl)

    return run


def attention(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
    """cuDNN attention; the inner weights are not its own."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def results(run: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The output and the gradients of NAMES."""
    leaves = (*inputs.tokens, *inputs.weights)
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.d_out)]


def errors(run: Callable[..., Tensor], inputs: Inputs, exact: list[Tensor]) -> dict[str, float]:
    """Relative errors by name. A result with NaN has the error NaN, which no limit admits."""
    pairs = zip(NAMES, results(run, inputs), exact, strict=True)
    return {name: ((got.double() - want).norm() / want.norm()).item() for name, got, want in pairs}


def check(inputs: Inputs, runs: dict[str, Callable[..., Tensor]]) -> dict:
    """Errors of every run against float64, and whether each is at most ALLOWED times that of plain PyTorch."""
    exact = results(layer("reference"), inputs.double())
    plain = errors(layer("reference"), inputs, exact)
    found = {name: errors(run, inputs, exact) for name, run in runs.items()}
    ratios = {name: max(error[n] / plain[n] for n in NAMES) for name, error in found.items()}
    # Not `max` alone: it passes over a NaN that does not come first.
    finite = {name: all(torch.isfinite(torch.tensor(list(error.values())))) for name, error in found.items()}
    correct = {name: bool(finite[name] and ratios[name] <= ALLOWED) for name in runs}
    return {"plain": plain, "errors": found, "worst_ratio": ratios, "correct": correct}


def timings(run: Callable[..., Tensor], inputs: Inputs, milliseconds: int) -> dict[str, float]:
    """Median milliseconds of the forward alone, and with the backward to every input of `run` that has one."""
    leaves = (*inputs.tokens, *inputs.weights)
    wanted = [*inputs.tokens, *(() if run is attention else inputs.weights)]

    @torch.no_grad()
    def forward() -> Tensor:
        return run(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves), wanted, inputs.d_out)

    return {"forward_ms": median_ms(forward, milliseconds), "both_ms": median_ms(both, milliseconds)}


def median_ms(run: Callable[[], object], milliseconds: int) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=milliseconds, rep=4 * milliseconds, return_mode="median")


def peak_bytes(run: Callable[..., Tensor], inputs: Inputs) -> int:
    """Most memory held in a training step, less what was there before, the output and the gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = results(run, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(t.numel() * t.element_size() for t in kept)


def bandwidth(gigabytes: float = 1.0) -> float:
    """Measured bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), 50) / 1e3)


def bounds(case: Case, bytes_a_second: float) -> dict[str, float]:
    """Memory floors in ms: q, k, v, out moved once; with the backward also the gradients, and q, k, v a second time."""
    tensor = case.images * case.tokens * case.heads * case.width * 2
    return {
        "forward_bound_ms": 1e3 * 4 * tensor / bytes_a_second,
        "both_bound_ms": 1e3 * (4 + 7) * tensor / bytes_a_second,
    }


def measure(case: Case, bytes_a_second: float, milliseconds: int = 50) -> dict:
    """Everything about one case, as it goes into the JSON file."""
    inputs = Inputs.draw(case)
    runs = {"triton": layer("triton"), "compiled reference": torch.compile(layer("reference"), dynamic=False)}
    checked = check(inputs, runs)
    measured = {
        name: timings(run, inputs, milliseconds) | {"peak_bytes": peak_bytes(run, inputs)} for name, run in runs.items()
    }
    try:
        measured["cudnn attention"] = timings(attention, inputs, milliseconds)
    except RuntimeError as error:
        print(f"{case}: cuDNN attention cannot do it and is left out: {error}")
    tensor_bytes = inputs.d_out.numel() * inputs.d_out.element_size()
    return {
        "case": str(case),
        **asdict(case),
        "tensor_bytes": tensor_bytes,
        **bounds(case, bytes_a_second),
        "runs": measured,
        "check": checked,
    }


def table(rows: list[dict]) -> str:
    """One line a case and run: times, times the bound, and the check without which a time says nothing."""
    head = f"{'case':<20}{'run':<20}{'fwd ms':>9}{'x bound':>9}{'fwd+bwd':>9}{'x bound':>9}{'peak/BNC':>10}  check"
    lines = [NOTE, head]
    for row in rows:
        for name, run in row["runs"].items():
            ratio = row["check"]["worst_ratio"].get(name)
            verdict = "another function" if ratio is None else f"error {ratio:.2f}x plain"
            if not row["check"]["correct"].get(name, True):
                verdict = f"WRONG, {verdict}"
            peak = f"{run['peak_bytes'] / row['tensor_bytes']:.2f}" if "peak_bytes" in run else "-"
            lines.append(
                f"{row['case']:<20}{name:<20}"
                f"{run['forward_ms']:>9.3f}{run['forward_ms'] / row['forward_bound_ms']:>9.1f}"
                f"{run['both_ms']:>9.3f}{run['both_ms'] / row['both_bound_ms']:>9.1f}{peak:>10}  {verdict}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--case", nargs="*", metavar="B,N,H,D", help="sizes instead of the usual ones")
    parser.add_argument("--fast", action="store_true", help="shorter measurements, noisier")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("t5kernels.bench: no CUDA device here; run it on the card whose times are wanted")
    cases = [Case(*map(int, text.split(","))) for text in options.case] if options.case else CASES
    bytes_a_second = bandwidth()
    rows = []
    for case in cases:
        rows.append(measure(case, bytes_a_second, 10 if options.fast else 50))
        # After every case: a later one that fails loses nothing.
        write(options.out, {**surroundings(), "bytes_a_second": bytes_a_second, "cases": rows})
    print(table(rows))
    if not all(right for row in rows for right in row["check"]["correct"].values()):
        raise SystemExit("t5kernels.bench: a result is further from float64 than allowed; its times mean nothing")


def surroundings() -> dict:
    import triton

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"note": NOTE, "device": device, "dtype": "bfloat16", **versions}


def write(path: Path, report: dict) -> None:
    """Atomic: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
