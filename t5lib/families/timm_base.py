"""What the adapters of timm's families share: a trunk with a patch embedding, and `blocks` with an attention `attn`."""

import copy
import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t5lib.families.base import Adapter, AttentionCall, check_multiple
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.families.refusals import advice
from t5lib.families.replacement import chosen_layers, replace_attentions, restarted
from t5lib.families.subclasses import softmax_class, subclass
from t5lib.families.timm_creation import create
from t5lib.layers.attention import TTTAttention, project
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, one_pass, tell_grid
from t5lib.utils.errors import T5Error
from t5lib.utils.threads import of_this_thread

# Methods of timm's models that call their blocks.
FORWARDS = ("forward", "forward_features", "forward_intermediates")
EMBEDDINGS = {"NaFlexVit": "embeds"}  # the name of the patch embedding by the model's class; others: patch_embed


class TimmAdapter(Adapter):
    """What timm's families share. A subclass says which models and attentions it takes, and what they are made of."""

    package = "timm"
    input_name = "x"
    features: ClassVar[str | None] = "norm"
    has_attention_maps = True
    model_classes: ClassVar[tuple[type[nn.Module], ...]]
    attention_classes: ClassVar[tuple[type[nn.Module], ...]]
    layer_class: ClassVar[type[TTTAttention]]

    def check_convertible(self, model: nn.Module) -> None:
        if not isinstance(model, self.model_classes):
            known = " or ".join(kind.__name__ for kind in self.model_classes)
            raise T5Error(f"{type(model).__name__} is not a timm {known}; pass such a model")
        for index, block in enumerate(self.blocks(model)):
            attention = getattr(block, "attn", None)
            if isinstance(attention, TTTAttention):
                raise T5Error(f"blocks.{index}.attn is converted already; call t5lib.revert first")
            if type(attention) not in self.attention_classes:
                present = type(attention).__name__ if attention is not None else type(block).__name__
                known = " or ".join(kind.__name__ for kind in self.attention_classes)
                raise T5Error(f"blocks.{index} uses {present}; only timm's {known} can be converted: {advice(present)}")
        if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
            raise T5Error("patch_drop_rate is set: dropped patches leave holes in the grid; build the model with 0")
        embedding = self.embedding(model)
        if getattr(embedding, "dynamic_feat_size", None) is None:
            raise T5Error(f"patch_embed is {type(embedding).__name__}, which does not give its token grid")

    def trunk(self, model: nn.Module) -> nn.Module:
        """The part of the model that holds its patch embedding and blocks."""
        return model

    def attention_names(self, model: nn.Module) -> list[str]:
        blocks = self.blocks(model)
        [name] = [name for name, part in model.named_modules() if part is blocks]
        return [f"{name}.{index}.attn" for index in range(len(blocks))]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The paper converts all."""
        everything = tuple(range(len(self.blocks(model))))
        return {"all": everything, "paper": everything}

    def blocks(self, model: nn.Module) -> nn.Sequential:
        return self.trunk(model).blocks

    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        size = inputs[self.input_name].shape[-2:]
        embedding = self.embedding(model)
        _check_size(embedding, tuple(size))
        rows, columns = embedding.dynamic_feat_size(size)
        return TokenGrid(rows, columns, model.num_prefix_tokens)

    def fixed_grid(self, model: nn.Module) -> TokenGrid | None:
        embedding = self.embedding(model)
        if not getattr(embedding, "strict_img_size", False):
            return None
        rows, columns = embedding.grid_size
        return TokenGrid(rows, columns, model.num_prefix_tokens)

    def embedding(self, model: nn.Module) -> nn.Module:
        trunk = self.trunk(model)
        return getattr(trunk, _embedding_name(type(trunk)))

    @staticmethod
    def announce(embedding: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        tell_grid(embedding, *embedding.dynamic_feat_size(arguments[0].shape[-2:]))

    def carry_grid(self, model: nn.Module) -> None:
        super().carry_grid(model)
        trunk = self.trunk(model)
        trunk.__class__ = _in_passes(type(trunk))  # type: ignore[arg-type]  # classes can be hashed

    def drop_grid(self, model: nn.Module) -> None:
        super().drop_grid(model)
        trunk = self.trunk(model)
        trunk.__class__ = softmax_class(type(trunk))

    def new_layer(self, model: nn.Module, attention: nn.Module, config: TTTConfig) -> TTTAttention:
        return self.layer_class(attention, config, model.num_prefix_tokens)

    def softmax_attention(self, layer: TTTAttention) -> nn.Module:
        return layer.softmax_attention()

    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        """See Adapter; timm's random initialization is the fresh start."""
        if inherit == "all":
            return []
        root = name if inherit == "mlp" else f"{name.rpartition('.')[0]}.mlp"
        with restarted(model, root) as part:
            for full, module in part.named_modules(prefix=root):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                init_weights_vit_timm(module, full)
        return [f"{root}.{parameter}" for parameter, _ in part.named_parameters()]

    def watch(
        self, attention: nn.Module, calls: dict[str, AttentionCall], outputs: dict[str, Tensor], name: str
    ) -> list[RemovableHandle]:
        """See Adapter; heads are taken before the pretrained norm and gate."""

        def keep_call(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            calls[name] = self.call_of(*arguments, **named)

        def keep_output(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            outputs[name] = arguments[0]

        return [
            attention.register_forward_pre_hook(of_this_thread(keep_call), with_kwargs=True),
            self.after_heads(attention).register_forward_pre_hook(of_this_thread(keep_output)),
        ]

    def after_heads(self, attention: nn.Module) -> nn.Module:
        """The part of an attention that receives the merged heads."""
        return attention.norm

    def call_of(self, x: Tensor, *_others: Any, **_named: Any) -> AttentionCall:
        """What of the arguments of an attention matters."""
        return AttentionCall((x,))

    def project(self, attention: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        [x] = call.tokens
        return project(attention, x, call.rope)

    def inputs(self, batch: Any) -> Inputs:
        """See Adapter; also what the processors of transformers give, {"pixel_values": …}, with or without labels."""
        if isinstance(batch, Mapping) and "pixel_values" in batch and not set(batch) - {"pixel_values", "labels"}:
            batch = batch["pixel_values"]
        return super().inputs(batch)

    def in_channels(self, model: nn.Module) -> int:
        return model.in_chans

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return model(**inputs)

    def num_tokens(self, model: nn.Module, inputs: Inputs) -> int:
        grid = self.grid(model, inputs)
        return grid.num_prefix_tokens + grid.rows * grid.columns

    def check_resolution(self, model: nn.Module, size: ExampleSize) -> None:
        check_multiple(size.resolution, self.embedding(model).patch_size[0], "the patch size")

    def at_resolution(self, model: nn.Module, size: ExampleSize) -> nn.Module:
        self.check_resolution(model, size)
        model = copy.deepcopy(model).eval()
        if hasattr(model, "set_input_size"):  # others take any size as they are
            model.set_input_size(img_size=(size.resolution, size.resolution))
        return model

    def example_inputs(self, model: nn.Module, size: ExampleSize) -> Inputs:
        shape = (size.batch, self.in_channels(model), size.resolution, size.resolution)
        return {self.input_name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def describe(self, model: nn.Module) -> tuple[str, dict[str, Any]]:
        """timm's architecture name, and the arguments of timm.create_model.

        Raises:
            T5Error: `model` was not made by timm.create_model.
        """
        architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        if not architecture:
            raise T5Error(f"this {type(model).__name__} was not made by timm.create_model; make it so, then save it")
        architecture = architecture.removeprefix("t5_").removesuffix("+")  # t5lib.weights.timm_registry's names
        asked = getattr(model, "_model_args", {})  # what timm.create_model was told (timm 1.0.31 and later keep it)
        embedding, blocks = self.embedding(model), self.blocks(model)
        present = {
            "patch_size": list(embedding.patch_size),
            "in_chans": model.in_chans,
            "global_pool": model.global_pool,
            "embed_dim": model.embed_dim,
            "depth": len(blocks),
            "num_heads": blocks[0].attn.num_heads,
        }
        if hasattr(embedding, "img_size"):
            present["img_size"] = list(embedding.img_size)
        if hasattr(model, "reset_classifier"):
            present["num_classes"] = model.num_classes
        if hasattr(model, "dynamic_img_size"):
            padded = embedding.dynamic_img_pad
            present |= {"dynamic_img_size": model.dynamic_img_size, "dynamic_img_pad": padded}
        return architecture, asked | present | self.own_arguments(model)

    @abstractmethod
    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of timm.create_model that this family alone has, as `model` is now."""

    def build(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        model = create(architecture, arguments)
        if config:
            replace_attentions(self, model, config, chosen_layers(self, model, config))
        return model

    def skeleton(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        with torch.device("meta"):
            return self.build(architecture, arguments, config)

    def fresh(self, model: nn.Module, seed: int) -> nn.Module:
        """A copy with timm's random initialization, since models may have been changed after they were created."""
        architecture, arguments = self.describe(model)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            twin = self.build(architecture, arguments, None)
        model = copy.deepcopy(model)
        try:
            model.load_state_dict(twin.state_dict())
        except RuntimeError as error:
            raise T5Error(
                f"no random control: timm's {architecture} with {arguments} is another model than this one, "
                f"which was changed after it was created: {error}"
            ) from None
        return model


@functools.cache
def _in_passes(kind: Any) -> type:
    """The class `kind` of models with every way to the blocks a pass (t5lib.layers.grid)."""
    ways = {name: one_pass(getattr(kind, name), _embedding_name(kind), "blocks") for name in FORWARDS}
    return subclass(kind, _in_passes, ways)


def check_plain_vit(model: nn.Module) -> None:
    """Raises T5Error unless what commands and targets ask of a ViT is where timm's VisionTransformer has it."""
    if not all(hasattr(model, part) for part in ("patch_embed", "blocks", "num_classes")):
        raise T5Error(
            f"{type(model).__name__} has its patch embedding or its blocks elsewhere than timm's ViTs, and commands, "
            "plans and targets take those alone; use t5lib in Python: t5lib.convert, t5lib.calibrate, t5lib.save"
        )


def _embedding_name(kind: type) -> str:
    return EMBEDDINGS.get(kind.__name__, "patch_embed")


def _check_size(patch_embed: nn.Module, size: tuple[int, ...]) -> None:
    """Raises T5Error unless images of `size`, (height, width) in pixels, can be cut into patches."""
    height, width = size
    if getattr(patch_embed, "strict_img_size", False):
        if size != tuple(patch_embed.img_size):
            own = "×".join(map(str, patch_embed.img_size))
            raise T5Error(
                f"images are {height}×{width} px, the model takes {own}; resize them, or call "
                f"model.set_input_size(img_size=({height}, {width})) before converting"
            )
    elif not getattr(patch_embed, "dynamic_img_pad", False):
        for side, patch in zip(size, patch_embed.feat_ratio(as_scalar=False), strict=True):
            check_multiple(side, patch, "the patch size")
