"""Converted models of transformers: subclasses under the names of transformers' own, with configurations of their own.

The configuration of a converted model holds the entry `t5_config`, and its `model_type` begins with "t5_": transformers
alone does not know that and refuses to load the model, where it would else make a softmax model of the weights.
`import t5lib.weights.transformers_registry` makes it known.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from t5lib.families import family_of
from t5lib.families.replacement import convert_as_told
from t5lib.families.subclasses import softmax_class, subclass
from t5lib.families.transformers_attention import MASK
from t5lib.families.transformers_towers import names_of, tower_of
from t5lib.layers.grid import on_current_grid, one_pass
from t5lib.utils.errors import T5Error

PREFIX = "t5_"  # of model types


class ConvertedModel:
    """A mixin that comes before transformers' class among the bases of a converted class."""

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **options: Any):
        super().__init__(config, *inputs, **options)  # type: ignore[call-arg]  # of the model beside it
        if told := getattr(config, "t5_config", None):
            convert_as_told(family_of(self), self, told)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *source: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load as transformers' own method does; heads may be new.

        Raises:
            T5Error: the files are those of a softmax model, or lack weights of the blocks or hold others.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]  # of the model beside it
            *source, output_loading_info=True, **options
        )
        _check_loaded(model, info, f"{source[0] if source else 'the checkpoint'}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *destination: Any, **options: Any) -> None:
        """Save as transformers' own method does.

        Raises:
            T5Error: this is a part of a converted model whose configuration does not tell the new layers.
        """
        if not getattr(self.config, "t5_config", None):
            raise T5Error(
                f"this {type(self).__name__} is a part of a converted model, and only the whole model's config.json "
                "describes the new layers; save that, or convert this part by itself"
            )
        super().save_pretrained(*destination, **options)  # type: ignore[misc]  # of the model beside it

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **options: Any
    ) -> None:
        super()._set_gradient_checkpointing(  # type: ignore[misc]  # of the model beside it
            enable, gradient_checkpointing_func=on_its_grid(gradient_checkpointing_func), **options
        )


@functools.cache
def converted_class(kind: Any) -> type:
    """The class of converted models of transformers' class `kind`."""
    attributes: dict[str, Any] = {"config_class": converted_config(kind.config_class)}
    if names := names_of(kind):
        attributes["forward"] = _of_whole_images(one_pass(kind.forward, names.patches, names.blocks))
    return subclass(kind, converted_class, attributes, ConvertedModel)


@functools.cache
def converted_config(kind: Any) -> type[PreTrainedConfig]:
    """The class of converted models' configurations, where transformers' own is `kind`."""
    model_type = PREFIX + kind.model_type
    if renamings := get_checkpoint_conversion_mapping(kind.model_type):  # weights have other names in files
        register_checkpoint_conversion_mapping(model_type, renamings, overwrite=True)
    attributes = {"__module__": __name__, "__qualname__": f"T5{kind.__name__}", "model_type": model_type}
    return subclass(kind, converted_config, attributes)


def mark_config(model: PreTrainedModel, told: dict[str, Any]) -> None:
    """Note the new layers of `model` in its configuration, as plain values. One that other models may share stays."""
    kind: Any = type(model.config)
    if kind is softmax_class(kind):
        _set_config(model, _of_class(model.config, converted_config(kind)))
    model.config.t5_config = told


def unmark_config(model: PreTrainedModel) -> None:
    """Undo `mark_config`."""
    _set_config(model, plain_config(model.config))


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` as it is without a conversion."""
    plain = _of_class(config, softmax_class(type(config)))
    vars(plain).pop("t5_config", None)
    return plain


def on_its_grid(checkpointing: Callable) -> Callable:
    """`checkpointing` of blocks, which are called again in the backward pass, by another thread and without a grid."""

    @functools.wraps(checkpointing)
    def run(block: Callable, *args: Any, **options: Any) -> Any:
        return checkpointing(on_current_grid(block), *args, **options)

    return run


def _of_whole_images(forward: Callable) -> Callable:
    """The `forward` of a tower, but that it refuses masks of tokens, and to give softmax maps."""

    @functools.wraps(forward)
    def run(tower: PreTrainedModel, *args: Any, **options: Any) -> Any:
        if options.get("output_attentions", getattr(tower.config, "output_attentions", False)):
            raise T5Error(
                "output_attentions is set, and a TTT layer has no softmax map to give; leave it out, or look at "
                "t5lib.explain, or give the model its attentions back: t5lib.revert(model)"
            )
        if options.get("attention_mask") is not None:
            raise T5Error(MASK)
        return forward(tower, *args, **options)

    return run


def _of_class(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A copy of `config` as an object of `kind`. Configurations in it are the same objects, as models share them."""
    config = copy.copy(config)
    config.__class__ = kind
    if "model_type" in vars(config):  # as configurations have it that were read from a file
        vars(config)["model_type"] = kind.model_type
    return config


def _set_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    before = model.config
    for module in model.modules():
        if vars(module).get("config") is before:
            module.config = config


def _check_loaded(model: Any, info: dict[str, Any], source: str) -> None:
    if not getattr(model.config, "t5_config", None):
        raise T5Error(
            f"{source} holds a softmax model, not a converted one; load it as transformers' own "
            f"{type(model).__name__} (AutoModel…), then convert it"
        )
    tower = tower_of(model)
    assert tower is not None  # it was converted
    blocks = f"{tower.path}.{tower.names.blocks}.".lstrip(".")
    made_up = {*info["missing_keys"], *(name for name, *_shapes in info["mismatched_keys"])}
    missing = sorted(name for name in made_up if name.startswith(blocks))
    unknown = sorted(name for name in info["unexpected_keys"] if ".mixer." in name)
    if missing or unknown:
        raise T5Error(
            f"the weights in {source} are not those of the {type(model).__name__} in its config.json: missing or of "
            f"another shape {missing[:3]}, unknown {unknown[:3]}; save or fetch it again"
        )
