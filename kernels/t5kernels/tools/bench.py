"""Time the whole layer by kernels beside cuDNN attention and the compiled reference, each beside its check.

    python -m t5kernels.tools.bench --out FILE.json [--case NAME ...] [--run NAME ...] [--fast]

Everything is measured in one run on one CUDA device, in bfloat16, on the same inputs: views of one (B, N, 3, H, D)
projection. A time is the median of replays of a CUDA graph (by triton.testing.do_bench, which empties the L2 cache
before each), so that it is the device's and not Python's; "eager" is the same call from Python. Every figure is written
as soon as it is measured.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from t5kernels.tools.cases import CASES, Case, Inputs
from t5kernels.tools.graphs import recorded

NOTE = "key norm and convolution of queries and keys included; attention gets image and text as one sequence"
METHOD = "median of CUDA graph replays by triton.testing.do_bench, L2 emptied before each"
RUNS = ("kernels", "cudnn", "compiled")
# The error of a kernel against float64 may be so many times that of plain PyTorch in the same dtype.
ALLOWED = 2.0
# So many tensors of the tokens' size must be moved: q, v, out once and k twice, because its statistics come first; in
# the backward q, k, v, the gradient of the output and those of q, k, v.
FORWARD_PASSES, BACKWARD_PASSES = 5, 7
# So many products of a token and a D x D matrix are needed for each head, forward and backward.
PRODUCTS = {"swiglu": (9, 23), "swiglu_last": (6, 16), "linear_proj_qk": (4, 10)}


@dataclass(frozen=True)
class Run:
    """`forward()` returns outputs with the gradients `d_outs`; they are differentiated by `leaves`."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: list[Tensor]
    d_outs: tuple[Tensor, ...]

    def step(self) -> tuple[Tensor, ...]:
        """The outputs and gradients of one training step."""
        outs = self.forward()
        return (*(o.detach() for o in outs), *torch.autograd.grad(outs, self.leaves, self.d_outs))


def attention(inputs: Inputs) -> Run:
    """cuDNN attention of the same tokens, without the layer's weights."""
    (q, k, v), d_outs = (inputs.leaves[name] for name in "qkv"), inputs.d_outs
    if inputs.case.text:
        pairs = ((image, inputs.leaves[f"text_{name}"]) for name, image in zip("qkv", (q, k, v), strict=True))
        q, k, v = (torch.cat(pair, dim=2).detach().requires_grad_() for pair in pairs)
        d_outs = (torch.cat(d_outs, dim=2),)

    def forward() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (F.scaled_dot_product_attention(q, k, v),)

    return Run(forward, [q, k, v], d_outs)


def layer(inputs: Inputs, impl: str, compiled: bool = False) -> Run:
    """The layer by one of its implementations, as it is or compiled."""
    call = torch.compile(inputs.layer, dynamic=False) if compiled else inputs.layer
    return Run(partial(call, impl), list(inputs.leaves.values()), inputs.d_outs)


def make(name: str, inputs: Inputs) -> Run:
    """The run that RUNS calls `name`."""
    return {
        "kernels": partial(layer, inputs, "triton"),
        "compiled": partial(layer, inputs, "reference", compiled=True),
        "cudnn": partial(attention, inputs),
    }[name]()


def results(inputs: Inputs, run: Run) -> dict[str, Tensor]:
    """The outputs and every gradient, by name."""
    names = [*(("out", "text_out")[: len(inputs.d_outs)]), *(f"d_{name}" for name in inputs.leaves)]
    return dict(zip(names, run.step(), strict=True))


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name. A result with NaN has the error NaN, which no limit admits."""
    return {name: ((actual[name].double() - right).norm() / right.norm()).item() for name, right in exact.items()}


def check(inputs: Inputs, runs: dict[str, Run]) -> dict[str, Any]:
    """The errors of every run against float64, and whether each is at most ALLOWED times that of plain PyTorch."""
    double = inputs.double()
    exact = results(double, layer(double, "reference"))
    plain = errors(results(inputs, layer(inputs, "reference")), exact)
    by_run = {name: errors(results(inputs, run), exact) for name, run in runs.items()}
    ratios = {name: max(error[n] / plain[n] for n in exact) for name, error in by_run.items()}
    # `max` alone would not do: it passes over a NaN that does not come first.
    correct = {name: all(error[n] <= ALLOWED * plain[n] for n in exact) for name, error in by_run.items()}
    return {"plain": plain, "errors": by_run, "worst_ratio": ratios, "correct": correct}


def median_ms(run: Callable[[], object], milliseconds: int) -> float:
    """The median time of a call in milliseconds; calls are repeated for four times `milliseconds`."""
    from triton.testing import do_bench

    median = do_bench(run, warmup=milliseconds, rep=4 * milliseconds, return_mode="median")
    assert isinstance(median, float)
    return median


def timings(run: Run, milliseconds: int, record: Callable[[dict], None] = lambda times: None) -> dict[str, float]:
    """Median milliseconds of the forward alone and of a training step; `record` gets each figure as it comes."""
    forward = torch.no_grad()(run.forward)
    times: dict[str, float] = {}
    for name, call in (
        ("forward_ms", recorded(forward)),
        ("forward_eager_ms", forward),
        ("both_ms", recorded(run.step)),
        ("both_eager_ms", run.step),
    ):
        times[name] = median_ms(call, milliseconds)
        record(times)
    return times


def peak_bytes(run: Run) -> int:
    """The peak of memory in a training step, less what was there before, the outputs and the gradients."""
    run.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tensors = run.step()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(t.numel() * t.element_size() for t in tensors)


def bandwidth(gigabytes: float = 1.0) -> float:
    """The measured bytes a second of a large copy; bytes are counted when read and when written."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), 50) / 1e3)


def products_a_second(size: int = 8192) -> float:
    """The measured FLOPs a second of a large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, 50) / 1e3)


def bounds(case: Case, bytes_a_second: float, flops_a_second: float) -> dict[str, float]:
    """Floors in ms: the bytes that must be moved at the measured bandwidth, and the products at the measured speed."""
    one_pass = 1e3 * 2 * case.elements / bytes_a_second
    product = 1e3 * 2 * case.elements * case.width / flops_a_second
    forward, backward = PRODUCTS[case.inner]
    return {
        "forward_bytes_ms": FORWARD_PASSES * one_pass,
        "both_bytes_ms": (FORWARD_PASSES + BACKWARD_PASSES) * one_pass,
        "forward_products_ms": forward * product,
        "both_products_ms": (forward + backward) * product,
    }


def measure(case: Case, names: list[str], machine: dict, milliseconds: int, record: Callable[[dict], None]) -> None:
    """Measure one case; `record` gets its row of the report whenever something was added."""
    inputs = Inputs.draw(case)
    row: dict[str, Any] = {"case": asdict(case), "tensor_bytes": 2 * case.elements, "runs": {}}
    row |= {"bounds": bounds(case, machine["bytes_a_second"], machine["flops_a_second"])}
    runs = {}
    for name in names:
        try:
            runs[name] = make(name, inputs)
            row["runs"][name] = {"peak_bytes": peak_bytes(runs[name])}
        except RuntimeError as error:
            print(f"{case}: {name} cannot do it and is left out: {str(error).splitlines()[0]}")
            runs.pop(name, None)
    row["check"] = check(inputs, {name: run for name, run in runs.items() if name != "cudnn"})
    torch.cuda.empty_cache()
    record(row)
    for name, run in runs.items():

        def add(times: dict, name: str = name) -> None:
            row["runs"][name] |= times
            record(row)

        timings(run, milliseconds, add)


def table(rows: list[dict]) -> str:
    """One line a case and run: times, bounds, memory, targets, and the check without which times mean nothing."""
    head = f"{'':<10}{'fwd ms':>8}{'x bytes':>8}{'x flops':>8}{'fwd+bwd':>9}{'x bytes':>8}{'x flops':>8}{'peak/BNC':>9}"
    lines = [NOTE, METHOD]
    for row in rows:
        lines += ["", str(Case(**row["case"])), head + "  targets and check"]
        lines += [_line(name, run, row) for name, run in row["runs"].items()]
    return "\n".join(lines)


def _line(name: str, run: dict, row: dict) -> str:
    cells = ""
    for kind, width in (("forward", 8), ("both", 9)):
        ms, bound = run.get(f"{kind}_ms"), row["bounds"]
        values = [ms, *(ms and ms / bound[f"{kind}_{by}_ms"] for by in ("bytes", "products"))]
        cells += "".join(
            f"{'-' if value is None else format(value, digits):>{size}}"
            for value, digits, size in zip(values, (".3f", ".1f", ".1f"), (width, 8, 8), strict=True)
        )
    return f"{name:<10}{cells}{run['peak_bytes'] / row['tensor_bytes']:>9.2f}  {_verdict(name, run, row)}"


def _verdict(name: str, run: dict, row: dict) -> str:
    """How exact the run is, and which of the case's targets the kernels reach."""
    ratio = row["check"]["worst_ratio"].get(name)
    verdicts = [] if ratio is None else [f"error {ratio:.2f}x plain"]
    if not row["check"]["correct"].get(name, True):
        verdicts.insert(0, "WRONG")
    targets = row["case"]["targets"]
    if name != "kernels" or not targets:
        return ", ".join(verdicts)
    figures = run | {"memory": run["peak_bytes"] / row["tensor_bytes"]}
    for kind, (must, aim) in targets.items():
        if kind in figures:
            value = figures[kind]
            verdict = "MISSED" if value > must else "must" if aim is None or value > aim else "aim"
            verdicts.append(f"{kind.removesuffix('_ms')} {verdict} ({must}/{'-' if aim is None else aim})")
    return ", ".join(verdicts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="these only")
    parser.add_argument("--run", nargs="*", choices=RUNS, help="these only")
    parser.add_argument("--fast", action="store_true", help="shorter measurements, noisier")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("t5kernels.tools.bench: this machine has no CUDA device; run it on the card to be measured")
    machine = {**surroundings(), "bytes_a_second": bandwidth(), "flops_a_second": products_a_second()}
    rows: dict[str, dict] = {}

    def record(row: dict) -> None:
        """Written after every figure, because what comes later may fail or be interrupted."""
        rows[row["case"]["name"]] = row
        write(options.out, {**machine, "cases": list(rows.values())})

    for case in CASES:
        if case.name in (options.case or [case.name]):
            measure(case, options.run or list(RUNS), machine, 10 if options.fast else 50, record)
            print(table([rows[case.name]]), flush=True)
    if not all(right for row in rows.values() for right in row["check"]["correct"].values()):
        raise SystemExit("t5kernels.tools.bench: a result is further from float64 than allowed; its times mean nothing")


def surroundings() -> dict:
    """The device and the versions that a report names."""
    import triton

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"note": NOTE, "method": METHOD, "device": device, "dtype": "bfloat16", **versions}


def write(path: Path, report: dict) -> None:
    """Write a report as JSON, atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
