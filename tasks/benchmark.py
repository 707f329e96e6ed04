"""benchmark: FLOPs, latency and memory of source and fine-tuned model against resolution, each figure checked."""

from typing import Any

import t5lib
from t5lib.benchmarks.resolution_sweep import benchmark, break_even_sentence, cost_ratios
from t5lib.report import plots
from tasks.targets.base import Target, device
from tasks.targets.run import main

READS = ("benchmark",)


def run(target: Target) -> dict[str, Any]:
    """Measure softmax and converted model side by side on the GPU if there is one, else on the CPU."""
    config, stage = target.section(), target.stage
    softmax, converted = (t5lib.load(stage.input(name)) for name in ("source", "finetune"))
    result = benchmark(softmax, converted, config, device=device(), on_row=_tell)
    print(break_even_sentence(result), flush=True)
    stage.write_json("benchmark.json", result)
    for name, draw, key in (
        ("speed.png", plots.speed_curves, "break_even_tokens"),
        ("flops.png", plots.flops_curves, "break_even_tokens_flops"),
    ):
        plots.save(draw(result["rows"], result[key]), stage.out / name)
        stage.artifact(stage.out / name)
    return _headline(result)


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['resolution']} px, {row['tokens']} tokens, {row['model']}: {row['ms']:.1f} ms, "
        f"{row['gflops']:.2f} GFLOPs (checked: {row['relative_error']:.1e} from {row['reference']})",
        flush=True,
    )


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    """Flat metrics; a break-even that was not reached is left out, never a made-up number."""
    tokens, ratio = cost_ratios(result["rows"])[-1]
    reached = {key: result[key] for key in ("break_even_tokens", "break_even_tokens_flops") if result[key] is not None}
    return {
        "device": result["device"],
        "dtype": result["dtype"],
        "largest_tokens": tokens,
        "speedup_at_largest": 1 / ratio,
        "max_relative_error": result["checked"]["max_relative_error"],
        "verdict": break_even_sentence(result),
        **reached,
    }


if __name__ == "__main__":
    main(run)
