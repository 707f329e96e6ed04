"""t5: turn a pretrained softmax vision transformer into a linear-cost Test-Time-Training one.

    import timm, t5lib
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=True)
    t5lib.diagnose(model, images)                        # shift ratio per layer and head
    t5 = t5lib.convert(model)                            # every pretrained weight inherited
    t5lib.calibrate(t5, teacher=model, batches=loader)   # attention transfer, no labels needed
    t5lib.align(t5, teacher=model, batches=loader)       # the whole model on the whole model, no labels either
    t5lib.save(t5, "out"); t5 = t5lib.load("out")        # safetensors + JSON
    pipe = t5lib.convert_pipeline(pipe)                  # Stable Diffusion 3, Flux … in diffusers; pipe.save_pretrained
    pipe = t5lib.load_pipeline("sd35-t5")

Names are imported when first used, so that `import t5lib` costs nothing. `import t5lib.weights.timm_registry` adds
converted architectures to timm: timm.create_model("t5_deit_tiny_patch16_224").
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "TTTConfig": "layers.config",
    "TTTAttention": "layers.attention",
    "T5Error": "utils.errors",
    "convert": "conversion",
    "revert": "conversion",
    "diagnose": "analysis.key_shift",
    "explain": "analysis.explanation",
    "implicit_attention": "analysis.attention_maps",
    "calibrate": "training.calibration",
    "CalibrateConfig": "training.calibration",
    "align": "training.alignment",
    "AlignConfig": "training.alignment",
    "train": "training.trainer",
    "TrainConfig": "training.classifier",
    "Classification": "training.classifier",
    "DenoiserTrainConfig": "training.denoiser",
    "Denoising": "training.denoiser",
    "evaluate": "evaluation.classifier",
    "benchmark": "benchmarks.resolution_sweep",
    "export_onnx": "onnx_export",
    "save": "checkpoint",
    "load": "checkpoint",
    "load_released": "weights.released",
    "load_weights": "weights.timm_vit",
    "load_pipeline": "pipelines",
    "load_transformer": "pipelines",
    "convert_pipeline": "pipelines",
    "parallelize": "parallelism",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from difflib import get_close_matches

        near = get_close_matches(name, __all__, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise AttributeError(f"module 't5lib' has no attribute '{name}'{hint}")
    from t5lib.utils.extras import extras_named

    with extras_named():
        value = getattr(import_module(f"t5lib.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
