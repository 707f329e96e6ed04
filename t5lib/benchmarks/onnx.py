"""A converted model and its softmax model as ONNX files, side by side in ONNX Runtime on the CPU."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t5lib.benchmarks.timing import describe_device, time_interleaved
from t5lib.conversion import revert
from t5lib.families import family_of
from t5lib.families.inputs import count, placed
from t5lib.onnx_export import export_onnx, open_onnx, run_onnx
from t5lib.utils.extras import extras_named

WARMUP = 2


def compare_exports(converted: nn.Module, batch: Any, *, repeats: int = 9) -> dict[str, Any]:
    """How fast the export of `converted` is beside that of its softmax model, on `batch`, in one run.

    Both are checked against their models first (t5lib.export_onnx). Every round times both, in turns.

    Args:
        batch: images (B, C, H, W), or all keyword arguments of the model's forward.
        repeats: timed passes of each; medians count.

    Returns:
        JSON-ready: device, onnxruntime, torch, threads, batch, tokens, warmup, repeats; `models`, for "softmax" and
        "t5" each ms, ms_runs, max_error, largest_output and megabytes; `speedup`, how many times as fast as softmax in
        the median round, and `speedup_range`, in the worst and the best.

    Raises:
        T5Error: one of them cannot be exported, or gives other numbers than its model: no speed for wrong results.
    """
    with extras_named():
        import onnxruntime

    family = family_of(converted)
    inputs = placed(family.inputs(batch), "cpu")
    models = {"softmax": revert(converted), "t5": converted}
    with tempfile.TemporaryDirectory() as folder:
        exports = {name: export_onnx(model, Path(folder) / f"{name}.onnx", batch) for name, model in models.items()}
        sessions = {name: open_onnx(export.path) for name, export in exports.items()}
        sizes = {name: sum(file.stat().st_size for file in Path(folder).glob(f"{name}.*")) for name in models}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(run_onnx, session, inputs) for name, session in sessions.items()
    }
    runs = time_interleaved(calls, warmup=WARMUP, repeats=repeats, device=torch.device("cpu"))
    ratios = [softmax / t5 for softmax, t5 in zip(runs["softmax"], runs["t5"], strict=True)]
    rows = {
        name: {
            "ms": statistics.median(runs[name]),
            "ms_runs": runs[name],
            "max_error": exports[name].max_error,
            "largest_output": exports[name].largest_output,
            "megabytes": sizes[name] / 1e6,
        }
        for name in models
    }
    return {
        "device": describe_device("cpu"),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": count(inputs),
        "tokens": family.num_tokens(converted, inputs),
        "warmup": WARMUP,
        "repeats": repeats,
        "models": rows,
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }
