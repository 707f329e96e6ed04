"""Vision transformers of transformers: ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP, ViTMAE, and models that hold one."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from t5lib.families.base import Adapter, AttentionCall, check_multiple
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.families.refusals import reason
from t5lib.families.replacement import chosen_layers, replace_attentions, restarted
from t5lib.families.subclasses import softmax_class
from t5lib.families.transformers_attention import TransformersTTTAttention, positions_of, project, rope_of
from t5lib.families.transformers_mae import check_unmasked, keep_order, masks, ordered_noise
from t5lib.families.transformers_models import (
    ConvertedModel,
    converted_class,
    mark_config,
    on_its_grid,
    plain_config,
    unmark_config,
)
from t5lib.families.transformers_towers import ATTENTIONS, TOWERS, Tower, tower_of
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, tell_grid
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.threads import of_this_thread

# Arguments of the classes of models besides their configuration, and the part that is there because of each.
OPTIONS = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}


class TransformersVit(Adapter):
    """Models of transformers that are, or hold, one of the vision towers of t5lib.families.transformers_towers."""

    name = "transformers_vit"
    package = "transformers"
    input_name = "pixel_values"
    has_attention_maps = True

    def check_convertible(self, model: nn.Module) -> None:
        tower = tower_of(model)
        if tower is None:
            raise T5Error(
                f"{type(model).__name__} is, or holds, none of the vision towers whose attentions can be converted "
                f"({', '.join(TOWERS)}); pass such a model, since attentions over text alone are not converted"
            )
        if "forward" in vars(tower.module):
            raise T5Error(
                f"the forward of {tower.path or 'the model'} is not that of its class (offloading, a patch); convert "
                "first, then dispatch or patch the model"
            )
        if masks(tower.module):
            check_unmasked(tower.module.embeddings)
        for name in tower.attention_names:
            _check_attention(model.get_submodule(name), name, tower)

    def attention_names(self, model: nn.Module) -> list[str]:
        return _tower(model).attention_names

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The paper converts all."""
        everything = tuple(range(len(_tower(model).blocks)))
        return {"all": everything, "paper": everything}

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return _tower(model).blocks

    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        """See Adapter; what is over a whole number of patches is left out, as transformers does."""
        tower, (height, width) = _tower(model), inputs[self.input_name].shape[-2:]
        rows, columns = (side // patch for side, patch in zip((height, width), tower.patches.stride, strict=True))
        if not rows or not columns:
            patch = "×".join(map(str, tower.patches.stride))
            raise T5Error(f"images are {height}×{width} px, smaller than a patch of {patch}; enlarge them")
        return TokenGrid(rows, columns, tower.num_prefix_tokens)

    def embedding(self, model: nn.Module) -> nn.Conv2d:
        return _tower(model).patches

    @staticmethod
    def announce(embedding: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """See Adapter; a token is made of each place in the convolution's output (B, C, rows, columns)."""
        tell_grid(embedding, *output.shape[-2:])

    def carry_grid(self, model: nn.Module) -> None:
        super().carry_grid(model)
        tower = _tower(model)
        tower.module.__class__ = converted_class(softmax_class(type(tower.module)))
        if masks(tower.module):
            tower.module.embeddings.register_forward_pre_hook(keep_order, with_kwargs=True)
        for block in tower.blocks._modules.values():
            if checkpointing := vars(block).get("_gradient_checkpointing_func"):
                block._gradient_checkpointing_func = on_its_grid(checkpointing)

    def drop_grid(self, model: nn.Module) -> None:
        super().drop_grid(model)
        module = _tower(model).module
        module.__class__ = softmax_class(type(module))
        hooks = module.embeddings._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is keep_order]:
            del hooks[key], module.embeddings._forward_pre_hooks_with_kwargs[key]

    def new_layer(self, model: nn.Module, attention: nn.Module, config: TTTConfig) -> TransformersTTTAttention:
        tower = _tower(model)
        return TransformersTTTAttention(attention, tower.names.output, config, tower.num_prefix_tokens)

    def softmax_attention(self, layer: TransformersTTTAttention) -> nn.Module:
        return layer.softmax_attention()

    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        """See Adapter; transformers' own random initialization is the fresh start."""
        if inherit == "all":
            return []
        root = name if inherit == "mlp" else f"{name.rpartition('.')[0]}.mlp"
        with restarted(model, root) as part:
            part.apply(_tower(model).module._init_weights)
        return [f"{root}.{parameter}" for parameter, _ in part.named_parameters()]

    def mark(self, model: nn.Module, config: TTTConfig) -> None:
        """Make `model` one of the converted class, in place, whose config.json will describe its layers."""
        model.__class__ = converted_class(softmax_class(type(model)))
        mark_config(model, to_dict(config))
        super().mark(model, config)

    def unmark(self, model: nn.Module) -> None:
        model.__class__ = softmax_class(type(model))
        unmark_config(model)
        super().unmark(model)

    def watch(
        self, attention: nn.Module, calls: dict[str, AttentionCall], outputs: dict[str, Tensor], name: str
    ) -> list[RemovableHandle]:
        def keep_call(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named["hidden_states"]
            calls[name] = AttentionCall((x,), rope_of(named.get("position_embeddings")))

        def keep_output(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            outputs[name] = arguments[0]

        return [
            attention.register_forward_pre_hook(of_this_thread(keep_call), with_kwargs=True),
            _output(attention).register_forward_pre_hook(of_this_thread(keep_output)),
        ]

    def project(self, attention: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        return project(attention, call)

    def projections(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.q_proj, layer.k_proj, layer.v_proj]

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        positions = positions_of(call.rope)
        attention(*call.tokens, **({} if positions is None else {"position_embeddings": positions}))

    def inputs(self, batch: Any) -> Inputs:
        """See Adapter; labels, which come along from data sets, are left out."""
        if isinstance(batch, Mapping):
            batch = {name: value for name, value in batch.items() if name != "labels"}
        return super().inputs(batch)

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        if others := sorted(inputs.keys() - {self.input_name}):
            raise T5Error(
                f"a batch holds {', '.join(others)} besides {self.input_name}, but only the vision tower is called; "
                f"pass the images alone: {{'{self.input_name}': …}}"
            )
        super().check_inputs(model, inputs)

    def in_channels(self, model: nn.Module) -> int:
        return _tower(model).patches.in_channels

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See Adapter: logits, depth, image embeddings, tokens, or a backbone's last feature map; the image features of
        a model of images and text. Images of another size than the model's are welcome."""
        options = self._options(model, inputs)
        if hasattr(model, "get_image_features"):
            return model.get_image_features(**inputs, **options).pooler_output
        outputs = model(**inputs, **options, return_dict=True)
        first = next(value for name, value in outputs.items() if name != "loss")
        return first[-1] if isinstance(first, tuple) else first

    def _options(self, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
        """What keeps patches in order, and resamples learned positions where that has to be asked for."""
        tower, images = _tower(model), inputs[self.input_name]
        options: dict[str, Any] = {}
        asked = inspect.signature(tower.module.forward).parameters
        if "interpolate_pos_encoding" in asked and tuple(images.shape[-2:]) != _own_size(tower):
            options["interpolate_pos_encoding"] = True
        if masks(tower.module) and not isinstance(tower.module, ConvertedModel):  # those see to it themselves
            grid = self.grid(model, inputs)
            options["noise"] = ordered_noise(len(images), grid.rows * grid.columns, images.device)
        return options

    def num_tokens(self, model: nn.Module, inputs: Inputs) -> int:
        grid = self.grid(model, inputs)
        return grid.num_prefix_tokens + grid.rows * grid.columns

    def check_resolution(self, model: nn.Module, size: ExampleSize) -> None:
        check_multiple(size.resolution, _tower(model).patches.stride[0], "the patch size")

    def at_resolution(self, model: nn.Module, size: ExampleSize) -> nn.Module:
        """See Adapter; transformers resamples learned positions in every call (`call` asks for it)."""
        self.check_resolution(model, size)
        return copy.deepcopy(model).eval()

    def example_inputs(self, model: nn.Module, size: ExampleSize) -> Inputs:
        shape = (size.batch, self.in_channels(model), size.resolution, size.resolution)
        return {self.input_name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def describe(self, model: nn.Module) -> tuple[str, dict[str, Any]]:
        """The name of transformers' class; its configuration and other arguments.

        Raises:
            T5Error: it is a class of somebody else's.
        """
        kind = softmax_class(type(model))
        if getattr(transformers, kind.__name__, None) is not kind:
            raise T5Error(f"{kind.__name__} is not a class of transformers, so loading could not find it again")
        asked = OPTIONS.keys() & inspect.signature(kind.__init__).parameters.keys()
        options = {name: _part(model, OPTIONS[name]) is not None for name in sorted(asked)}
        return kind.__name__, {"config": plain_config(model.config).to_dict(), **options}

    def build(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        kind: Any = getattr(transformers, architecture, None)
        if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
            raise T5Error(f"transformers {transformers.__version__} has no model '{architecture}'; update it")
        config_class: Any = kind.config_class
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        model = kind(config_class.from_dict(arguments["config"]), **options).eval()
        if config:
            replace_attentions(self, model, config, chosen_layers(self, model, config))
        return model

    def skeleton(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        with torch.device("meta"):
            return self.build(architecture, arguments, config)

    def fresh(self, model: nn.Module, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.build(*self.describe(model), None).to(next(model.parameters()))


def _tower(model: nn.Module) -> Tower:
    tower = tower_of(model)
    assert tower is not None  # check_convertible
    return tower


def _check_attention(attention: nn.Module, name: str, tower: Tower) -> None:
    """Raises T5Error unless `attention`, called `name`, is one whose layout is known."""
    if isinstance(attention, TransformersTTTAttention):
        raise T5Error(f"{name} is converted already; call t5lib.revert first")
    kind = type(attention).__name__
    if kind not in ATTENTIONS:
        raise T5Error(f"{name} is {kind}, which cannot be converted: {reason(kind)}")
    if not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj", tower.names.output)):
        raise T5Error(
            f"{name}, a {kind}, has other parts in transformers {transformers.__version__} than t5lib knows; DINOv2 "
            "needs 5.18 or newer: pip install -U transformers"
        )


def _output(attention: nn.Module) -> nn.Module:
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj


def _own_size(tower: Tower) -> tuple[int, int]:
    """Height and width of the images that the tower's positions are for."""
    size = tower.module.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _part(model: nn.Module, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


ADAPTER = TransformersVit()
