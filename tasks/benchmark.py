"""benchmark: FLOPs, latency and memory of source and fine-tuned model against resolution, each figure checked."""

from typing import Any

import torch

import t5lib
from t5lib.benchmarks.resolution_sweep import BenchmarkConfig, benchmark, break_even_sentence, cost_ratios
from t5lib.report import plots
from t5lib.utils.files import write_json
from tasks.runtime.stage import Stage, main

SECTIONS = {"benchmark": BenchmarkConfig}


def run(stage: Stage) -> dict[str, Any]:
    """Measure softmax and converted model side by side on the GPU if there is one, else on the CPU."""
    config = stage.params(BenchmarkConfig)
    softmax, converted = t5lib.load(stage.input("source")), t5lib.load(stage.input("finetune"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = benchmark(softmax, converted, config, device=device, on_row=_tell)
    print(break_even_sentence(result), flush=True)
    write_json(stage.out / "benchmark.json", result)
    stage.artifact(stage.out / "benchmark.json")
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
