"""Converted models known to transformers' Auto classes, and so to its pipelines, by their folder or repository.

import t5lib.weights.transformers_registry    # registers them

model = AutoModelForImageClassification.from_pretrained("out")    # of save_pretrained or push_to_hub
pipe = pipeline("image-feature-extraction", model="out")
"""

from typing import Any

from transformers import AutoConfig
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from t5lib.families.transformers_models import converted_class, converted_config

MODEL_TYPES = (
    *("vit", "deit", "vit_msn", "vit_mae", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit", "depth_anything"),
    *("siglip", "siglip_vision_model", "clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
)
AUTOS = [
    each
    for each in vars(modeling_auto).values()
    if isinstance(each, type) and issubclass(each, _BaseAutoModelClass) and each._model_mapping is not None
]


def _register(model_type: str) -> None:
    own: Any = configuration_auto.CONFIG_MAPPING[model_type]
    config = converted_config(own)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in AUTOS:
        if kinds := auto._model_mapping.get(own, None):
            auto.register(config, _converted(kinds), exist_ok=True)


def _converted(kinds: Any) -> Any:
    """Where a configuration stands for several classes, the first that its config.json names is taken."""
    return tuple(map(converted_class, kinds)) if isinstance(kinds, tuple) else converted_class(kinds)


for _model_type in MODEL_TYPES:
    _register(_model_type)
