"""Time every kernel of the layer with other tiles, to fill the tables TILES for a card.

    python -m t5kernels.tools.sweep --case NAME --out FILE.json [--kernel NAME ...]

It prints the fastest tiles of each kernel, in milliseconds of a call (the sum of its partial results included). Beside
each stands the deviation of its results from those of the tile in use: another tile only rounds and adds in another
order. Every tile is written as soon as it is timed, so a sweep that is interrupted has lost nothing.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from t5kernels.launch import Tile, padded_to
from t5kernels.tools.bench import bandwidth, median_ms, surroundings, write
from t5kernels.tools.cases import CASES, Case, Inputs
from t5kernels.ttt import triton as ttt
from t5kernels.ttt.triton_tiles import groups_of
from t5kernels.ttt_layer import triton as layer
from t5kernels.ttt_layer import triton_launch, triton_prepare
from t5kernels.ttt_layer.reference import inner_rate
from t5kernels.ttt_layer.triton import EVERY_TILE

TILES_TO_SHOW = 6
Call = Callable[[], tuple[Tensor, ...]]


def candidates(kernel: str, width: int) -> Iterator[Tile]:
    """The tiles to try for heads of a padded width."""
    if kernel in triton_launch.TILES:
        depths = (1, 2, 3) if kernel.startswith("prepare") else (1,)
        sizes = itertools.product((512, 1024, 2048, 4096), (2, 4, 8), depths, (2, 3, 4, 6))
        for numbers, warps, stages, resident in sizes:
            yield Tile(block=max(1, numbers // width), warps=warps, stages=stages, resident=resident)
        return
    if groups_of(width)[1]:
        yield from _candidates_in_groups(kernel)
        return
    hidden = [width] if _takes_all(kernel) else sorted({min(width, 64), 32})
    for columns, block, warps, stages in itertools.product(hidden, (32, 64, 128), (4, 8), (1, 2, 3)):
        for resident in range(1, 1 + 16 // warps):
            yield Tile(hidden=columns, block=block, warps=warps, stages=stages, resident=resident)


def _candidates_in_groups(kernel: str) -> Iterator[Tile]:
    """Those for heads whose channels are two groups."""
    # A cut is hidden columns, warps, and the resident programs that the sums leave room for.
    if _takes_all(kernel):
        sizes = itertools.product(((128, 4, 2), (128, 8, 1)), (32, 64, 128), (1, 2, 3))
    elif kernel.endswith("backward"):
        sizes = itertools.product(((32, 4, 2), (64, 4, 2), (32, 8, 1), (64, 8, 1)), (64, 128), (1, 2))
    elif kernel == "apply":  # in one slice, so that the weights are loaded once
        sizes = itertools.product(((128, 4, 2), (128, 8, 1)), (64, 128), (1, 2, 3))
    else:
        sizes = itertools.product(((64, 4, 2), (64, 4, 3), (64, 8, 1), (128, 8, 1)), (32, 64, 128), (2, 3))
    for (hidden, warps, resident), block, stages in sizes:
        yield Tile(hidden=hidden, block=block, warps=warps, stages=stages, resident=resident)


def _takes_all(kernel: str) -> bool:
    """Whether the kernel is best, or needs, to take all columns of the inner model at once."""
    return "linear" in kernel


def calls(case: Case) -> dict[str, Call]:
    """By kernel, a call that returns its results on the image's tokens of a case."""
    inputs = Inputs.draw(replace(case, inner="swiglu"))  # whose three weights serve every inner model
    leaves = {name: t.detach() for name, t in inputs.leaves.items()}
    q, k, v = (leaves[name] for name in "qkv")
    weights = [leaves[f"w{i}"] for i in (1, 2, 3)]
    d_out = inputs.d_outs[0]
    q_conv, k_conv = ((leaves[f"{name}_weight"], leaves[f"{name}_bias"]) for name in "qk")
    convs = layer.convolutions(*q_conv, *k_conv, (case.rows, case.columns, case.prefix))
    key_sums, none = layer.empty_sums(k, None, case.settings.norm_scope), (None, None)
    (part,) = layer.parts_of(
        (q, k, v), (None, None, None), convs, (none, none), key_sums, k, case.settings.norm_scope, case.settings.eps
    )
    layer.take_statistics([part], case.settings.norm_scope, 0.0)
    ((queries,), (keys,)) = (triton_launch.prepared([each]) for each in ((q, part.for_q), (k, part.for_k)))
    products: dict[str, Call] = {}
    for inner in ttt.INNERS.values():
        products = _products(inner, keys, v, queries, d_out, weights) | products  # the first one's, where they share
    dk = products["accumulate_backward"]()[0]
    (dn,), sums = triton_launch.prepare_backward([(dk, k, part.for_k)])

    def norm_backward() -> tuple[Tensor]:
        out = dn.clone()  # the kernel writes in place; the copy costs a pass more, the same for every tile
        triton_launch.norm_backward([(out, k, part.for_k)], sums, apart=False, gain_rows=None)
        return (out,)

    def prepare_backward() -> tuple[Tensor, Tensor]:
        (dx,), own_sums = triton_launch.prepare_backward([(dk, k, part.for_k)])
        assert own_sums is not None
        # Another tile has other programs. Those outside the grid have no sums for the convolution.
        of_norm = triton_prepare.PLAIN_SUM.value
        on_grid = own_sums.rows[:, : own_sums.on_grid, :of_norm]
        return dx, torch.cat([on_grid.sum(1), own_sums.rows[:, :, of_norm:].sum(1)], dim=1)

    def statistics() -> tuple[Tensor]:
        layer.take_statistics([part], case.settings.norm_scope, 0.0)
        return (key_sums[:, :, :2].sum(1),)  # without s, of which every program has its own

    return {
        "statistics": statistics,
        "prepare": lambda: tuple(triton_launch.prepared([(k, part.for_k)])),
        "prepare_backward": prepare_backward,
        "norm_backward": norm_backward,
        **products,
    }


def _products(
    inner: ttt.Inner, keys: Tensor, v: Tensor, queries: Tensor, d_out: Tensor, weights: list[Tensor]
) -> dict[str, Call]:
    """By kernel, the calls of an inner model."""
    scale = inner_rate(queries, None)
    step = ttt.launch_accumulate([(keys, v)], weights, scale, inner)
    _, gradients = ttt.launch_apply_backward([(d_out, queries)], weights, step, scale, inner)

    def apply_backward() -> tuple[Tensor, Tensor]:
        (dq,), gradients = ttt.launch_apply_backward([(d_out, queries)], weights, step, scale, inner)
        return dq, gradients

    def accumulate_backward() -> tuple[Tensor, ...]:
        d_step = inner.step_gradient(gradients)
        dk, dv, own_sums = ttt.launch_accumulate_backward(d_step, [(keys, v)], weights, scale, inner)
        return *dk, *dv, ttt.weights_summed(own_sums)

    return {
        inner.on_keys: lambda: (ttt.launch_accumulate([(keys, v)], weights, scale, inner),),
        inner.on_queries: lambda: tuple(ttt.launch_apply([queries], weights, step, scale, inner)),
        f"{inner.on_queries}_backward": apply_backward,
        f"{inner.on_keys}_backward": accumulate_backward,
    }


def sweep(kernel: str, call: Call, width: int, record: Callable[[dict], None] = lambda row: None) -> list[dict]:
    """Time every tile that fits the card; they come fastest first. `record` gets each as soon as it is timed."""
    in_use = EVERY_TILE[kernel][width]
    expected, rows = call(), []
    others = (tile for tile in candidates(kernel, width) if tile != in_use)
    try:
        for tile in (in_use, *others):
            EVERY_TILE[kernel][width] = tile
            try:
                deviation = max(
                    ((a.float() - b.float()).norm() / b.float().norm()).item()
                    for a, b in zip(call(), expected, strict=True)
                )
                milliseconds = median_ms(call, 5)
            except Exception as error:
                # The tile takes too much shared memory or too many registers; each Triton says so by another class. A
                # card that is broken fails with every tile.
                print(f"{kernel}: {tile}: {str(error).splitlines()[0][:100]}")
                continue
            rows.append({"tile": str(tile), "ms": milliseconds, "deviation": deviation, "in_use": tile == in_use})
            record(rows[-1])
    finally:
        EVERY_TILE[kernel][width] = in_use
    return sorted(rows, key=lambda row: row["ms"])


def main(arguments: list[str] | None = None) -> None:
    names = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", required=True, choices=list(names))
    parser.add_argument("--kernel", nargs="*", choices=list(EVERY_TILE), help="these only")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every tile")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("t5kernels.tools.sweep: this machine has no CUDA device; run it on the card to be tuned for")
    case, report = names[options.case], {**surroundings(), "case": asdict(names[options.case]), "kernels": {}}
    tensor_ms = 1e3 * 2 * case.images * case.tokens * case.heads * case.width / bandwidth()
    for kernel, call in calls(case).items():
        if options.kernel and kernel not in options.kernel:
            continue
        rows: list[dict] = []
        report["kernels"][kernel] = rows

        def record(row: dict, rows: list = rows) -> None:
            rows.append(row)
            write(options.out, report)

        tiles = sweep(kernel, call, padded_to(EVERY_TILE[kernel], case.width), record)
        print(f"{kernel}, {case}; one pass over a tensor of tokens takes {tensor_ms:.4f} ms")
        for place, row in enumerate(tiles):
            if place < TILES_TO_SHOW or row["in_use"]:
                note = "  (in use)" if row["in_use"] else ""
                print(f"  {row['ms']:.4f} ms  {row['tile']}  deviation {row['deviation']:.1e}{note}", flush=True)


if __name__ == "__main__":
    main()
