"""t5: turn a pretrained softmax vision transformer into a linear-cost Test-Time-Training one.

    import timm, t5lib
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=True)
    t5lib.diagnose(model, images)                        # shift ratio per layer and head
    t5 = t5lib.convert(model)                            # every pretrained weight inherited
    t5lib.calibrate(t5, teacher=model, batches=loader)   # attention transfer, no labels needed
    t5lib.save(t5, "out"); t5 = t5lib.load("out")        # safetensors + JSON

Names are imported when first used, so that `import t5lib` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "T5Config": "attention",
    "TTTAttention": "attention",
    "T5Error": "errors",
    "convert": "conversion",
    "revert": "conversion",
    "diagnose": "diagnosis",
    "calibrate": "calibration",
    "CalibrateConfig": "calibration",
    "train": "training",
    "TrainConfig": "training",
    "evaluate": "evaluation",
    "save": "checkpoint",
    "load": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 't5lib' has no attribute '{name}'")
    value = getattr(import_module(f"t5lib.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
