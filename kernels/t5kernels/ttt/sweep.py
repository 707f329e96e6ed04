"""Times every kernel of `ttt` with other tiles, to fill triton.TILES for a card.

    python -m t5kernels.ttt.sweep --case B,N,H,D [--kernel NAME ...] [--out FILE.json]

Prints the fastest tiles of each kernel, in milliseconds of a call (its partial sums added), each with the deviation of
its result from that of the tile in use: other tiles round and add in another order, no more.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from t5kernels.bench import Case, Inputs, bandwidth, median_ms
from t5kernels.ttt import triton as kernels

SHOWN = 6


def candidates(width: int, sliced: bool) -> Iterator[kernels.Tile]:
    """Tiles for heads of a padded width; `sliced`: also with half the hidden columns a program."""
    hidden = {width, max(16, width // 2)} if sliced else {width}
    settings = itertools.product(sorted(hidden), (32, 64, 128), (4, 8), (1, 2, 3), (1, 2, 3, 4))
    for hidden_, block, warps, stages, resident in settings:
        if resident * warps <= 16:
            yield kernels.Tile(hidden=hidden_, block=block, warps=warps, stages=stages, resident=resident)


def calls(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By kernel, a call that gives its results."""
    inputs = Inputs.draw(case)
    q, k, v = (t.detach() for t in inputs.tokens)
    weights = [w.detach() for w in inputs.weights]
    scale = case.width**-0.5 / case.tokens
    step = kernels._accumulate(k, v, *weights, scale)
    d_step = kernels._apply_backward(inputs.d_out, q, *weights, step)[1]
    return {
        "accumulate": lambda: (kernels._accumulate(k, v, *weights, scale),),
        "apply": lambda: (kernels._apply(q, *weights, step),),
        "apply_backward": lambda: kernels._apply_backward(inputs.d_out, q, *weights, step),
        "accumulate_backward": lambda: kernels._accumulate_backward(d_step, k, v, *weights, scale),
    }


def sweep(kernel: str, call: Callable[[], tuple[Tensor, ...]], width: int) -> list[dict]:
    """Every tile that fits the card, fastest first."""
    in_use = kernels.TILES[kernel][width]
    expected, rows = call(), []
    try:
        for tile in candidates(width, sliced=width > 64):
            kernels.TILES[kernel][width] = tile
            try:
                deviation = max(
                    ((a.float() - b.float()).norm() / b.float().norm()).item()
                    for a, b in zip(call(), expected, strict=True)
                )
                milliseconds = median_ms(call, 5)
            except Exception as error:
                # Out of shared memory or registers, by whatever class this Triton says it; a sick card shows in all.
                print(f"{kernel}: {tile}: {str(error).splitlines()[0][:100]}")
                continue
            rows.append({"tile": str(tile), "ms": milliseconds, "deviation": deviation, "in_use": tile == in_use})
    finally:
        kernels.TILES[kernel][width] = in_use
    return sorted(rows, key=lambda row: row["ms"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True, metavar="B,N,H,D")
    parser.add_argument("--kernel", nargs="*", choices=list(kernels.TILES), help="these only")
    parser.add_argument("--out", type=Path, help="JSON file with every tile")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("t5kernels.ttt.sweep: no CUDA device here; run it on the card that the tiles are for")
    case = Case(*map(int, options.case.split(",")))
    width = kernels.padded_width(case.width)
    tensor_ms = 1e3 * case.images * case.tokens * case.heads * case.width * 2 / bandwidth()
    found = {}
    for kernel, call in calls(case).items():
        if options.kernel and kernel not in options.kernel:
            continue
        found[kernel] = sweep(kernel, call, width)
        print(f"{kernel}, {case}; one pass over a tensor of tokens takes {tensor_ms:.4f} ms")
        for place, row in enumerate(found[kernel]):
            if place < SHOWN or row["in_use"]:
                used = "  (in use)" if row["in_use"] else ""
                print(f"  {row['ms']:.4f} ms  {row['tile']}  deviation {row['deviation']:.1e}{used}")
    if options.out:
        options.out.write_text(json.dumps({"case": str(case), "kernels": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
