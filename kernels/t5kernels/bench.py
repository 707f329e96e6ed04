"""Times of the whole layer by kernels beside cuDNN attention and the compiled reference, each beside its check.

    python -m t5kernels.bench --out FILE.json [--case NAME ...] [--run NAME ...] [--fast]

One CUDA device, bfloat16, everything in one run on the same inputs: views of one (B, N, 3, H, D) projection. A time is
the median of replays of a CUDA graph (triton.testing.do_bench, which empties the L2 cache before each), so that it is
the device's and not Python's; "eager" is the same call from Python. What is measured is written as it comes.
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

from t5kernels.cases import CASES, Case, Inputs

NOTE = "key norm and convolution of queries and keys included; attention gets image and text as one sequence"
METHOD = "median of CUDA graph replays by triton.testing.do_bench, L2 emptied before each"
RUNS = ("kernels", "cudnn", "compiled")
# A kernel may be this many times as far from float64 as plain PyTorch in the same dtype.
ALLOWED = 2.0
# Tensors of the tokens' size that must be moved: q, v, out once and k twice (its statistics come first); in the
# backward q, k, v, the gradient of the output and those of q, k, v.
FORWARD_PASSES, BACKWARD_PASSES = 5, 7
# Products of two D x D matrices' size for each token and head.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 9, 23


@dataclass(frozen=True)
class Run:
    """`forward()` gives outputs whose gradients are `d_outs`; they are differentiated by `leaves`."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: list[Tensor]
    d_outs: tuple[Tensor, ...]

    def step(self) -> tuple[Tensor, ...]:
        """Outputs and gradients of one training step."""
        outs = self.forward()
        return (*(o.detach() for o in outs), *torch.autograd.grad(outs, self.leaves, self.d_outs))


def attention(inputs: Inputs) -> Run:
    """cuDNN attention of the same tokens; the layer's own weights are not its own."""
    tokens, d_outs = [inputs.leaves[name] for name in "qkv"], inputs.d_outs
    if inputs.case.text:
        pairs = zip(tokens, (inputs.leaves[f"text_{name}"] for name in "qkv"), strict=True)
        tokens = [torch.cat(pair, dim=2).detach().requires_grad_() for pair in pairs]
        d_outs = (torch.cat(d_outs, dim=2),)

    def forward() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (F.scaled_dot_product_attention(*tokens),)

    return Run(forward, tokens, d_outs)


def layer(inputs: Inputs, impl: str, compiled: bool = False) -> Run:
    call = torch.compile(inputs.layer, dynamic=False) if compiled else inputs.layer
    return Run(partial(call, impl), list(inputs.leaves.values()), inputs.d_outs)


def make(name: str, inputs: Inputs) -> Run:
    """A run of RUNS."""
    return {
        "kernels": partial(layer, inputs, "triton"),
        "compiled": partial(layer, inputs, "reference", compiled=True),
        "cudnn": partial(attention, inputs),
    }[name]()


def results(inputs: Inputs, run: Run) -> dict[str, Tensor]:
    names = [*(("out", "text_out")[: len(inputs.d_outs)]), *(f"d_{name}" for name in inputs.leaves)]
    return dict(zip(names, run.step(), strict=True))


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name. A result with NaN has the error NaN, which no limit admits."""
    return {name: ((found[name].double() - want).norm() / want.norm()).item() for name, want in exact.items()}


def check(inputs: Inputs, runs: dict[str, Run]) -> dict[str, Any]:
    """Errors of every run against float64, and whether each is at most ALLOWED times that of plain PyTorch."""
    double = inputs.double()
    exact = results(double, layer(double, "reference"))
    plain = errors(results(inputs, layer(inputs, "reference")), exact)
    found = {name: errors(results(inputs, run), exact) for name, run in runs.items()}
    ratios = {name: max(error[n] / plain[n] for n in exact) for name, error in found.items()}
    # Not `max` alone: it passes over a NaN that does not come first.
    correct = {name: all(error[n] <= ALLOWED * plain[n] for n in exact) for name, error in found.items()}
    return {"plain": plain, "errors": found, "worst_ratio": ratios, "correct": correct}


def median_ms(run: Callable[[], object], milliseconds: int) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=milliseconds, rep=4 * milliseconds, return_mode="median")


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """A replay of what `run` does on the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timings(run: Run, milliseconds: int, record: Callable[[dict], None] = lambda measured: None) -> dict[str, float]:
    """Median milliseconds of the forward alone and of a training step; `record` gets each figure as it comes."""
    forward = torch.no_grad()(run.forward)
    measured: dict[str, float] = {}
    for name, call in (
        ("forward_ms", graphed(forward)),
        ("forward_eager_ms", forward),
        ("both_ms", graphed(run.step)),
        ("both_eager_ms", run.step),
    ):
        measured[name] = median_ms(call, milliseconds)
        record(measured)
    return measured


def peak_bytes(run: Run) -> int:
    """Most memory held in a training step, less what was there before, the outputs and the gradients."""
    run.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run.step()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(t.numel() * t.element_size() for t in kept)


def bandwidth(gigabytes: float = 1.0) -> float:
    """Measured bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), 50) / 1e3)


def products_a_second(size: int = 8192) -> float:
    """Measured FLOPs a second of a large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, 50) / 1e3)


def bounds(case: Case, bytes_a_second: float, flops_a_second: float) -> dict[str, float]:
    """Floors in ms: what must be moved over the measured bandwidth, and matrix products at the measured speed."""
    moved = 1e3 * 2 * case.elements / bytes_a_second
    product = 1e3 * 2 * case.elements * case.width / flops_a_second
    return {
        "forward_bytes_ms": FORWARD_PASSES * moved,
        "both_bytes_ms": (FORWARD_PASSES + BACKWARD_PASSES) * moved,
        "forward_products_ms": FORWARD_PRODUCTS * product,
        "both_products_ms": (FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * product,
    }


def measure(case: Case, names: list[str], machine: dict, milliseconds: int, record: Callable[[dict], None]) -> None:
    """One case; `record` gets its row of the report whenever something was added."""
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

        def add(measured: dict, name: str = name) -> None:
            row["runs"][name] |= measured
            record(row)

        timings(run, milliseconds, add)


def table(rows: list[dict]) -> str:
    """One line a case and run: times, bounds, memory, targets, and the check without which they mean nothing."""
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
    """What of a case's targets the kernels reach, and how exact the run is."""
    ratio = row["check"]["worst_ratio"].get(name)
    told = [] if ratio is None else [f"error {ratio:.2f}x plain"]
    if not row["check"]["correct"].get(name, True):
        told.insert(0, "WRONG")
    targets = row["case"]["targets"]
    if name != "kernels" or not targets:
        return ", ".join(told)
    measured = run | {"memory": run["peak_bytes"] / row["tensor_bytes"]}
    for kind, (must, aim) in targets.items():
        if kind in measured:
            value = measured[kind]
            reached = "MISSED" if value > must else "must" if aim is None or value > aim else "aim"
            told.append(f"{kind.removesuffix('_ms')} {reached} ({must}/{'-' if aim is None else aim})")
    return ", ".join(told)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="these only")
    parser.add_argument("--run", nargs="*", choices=RUNS, help="these only")
    parser.add_argument("--fast", action="store_true", help="shorter measurements, noisier")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("t5kernels.bench: no CUDA device here; run it on the card whose times are wanted")
    machine = {**surroundings(), "bytes_a_second": bandwidth(), "flops_a_second": products_a_second()}
    rows: dict[str, dict] = {}

    def record(row: dict) -> None:
        """After every figure: what comes later may fail or be cut."""
        rows[row["case"]["name"]] = row
        write(options.out, {**machine, "cases": list(rows.values())})

    for case in CASES:
        if case.name in (options.case or [case.name]):
            measure(case, options.run or list(RUNS), machine, 10 if options.fast else 50, record)
            print(table([rows[case.name]]), flush=True)
    if not all(right for row in rows.values() for right in row["check"]["correct"].values()):
        raise SystemExit("t5kernels.bench: a result is further from float64 than allowed; its times mean nothing")


def surroundings() -> dict:
    import triton

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"note": NOTE, "method": METHOD, "device": device, "dtype": "bfloat16", **versions}


def write(path: Path, report: dict) -> None:
    """Atomic: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
