"""What the adapters of the families of diffusers share, and their converted models.

Shapes: B latents, N image tokens, T text tokens, C channels, H heads, D head width.
"""

import copy
import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t5lib.families.base import Adapter, AttentionCall, check_multiple
from t5lib.families.diffusers_attention import IMAGE, TEXT, DiffusersTTTAttention, check_attention, projected
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.families.replacement import convert_as_told
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, tell_grid
from t5lib.layers.split import RowsOfGrid
from t5lib.utils.config import LARGEST, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.threads import of_this_thread
from t5lib.utils.weights import check_numbers

LONGEST_SCHEDULE = 4000  # that of "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672)


class ConvertedModel:
    """A mixin that comes before diffusers' class among the bases of a converted class.

    Weights are loaded whole and none is made up; layerwise casting leaves new ones as they are.
    """

    t5_config: TTTConfig | None = None
    _skip_layerwise_casting_patterns: list[str]

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls._skip_layerwise_casting_patterns = [*cls._skip_layerwise_casting_patterns, "mixer"]

    @classmethod
    def from_pretrained(cls, *source: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load as diffusers' own method does.

        Raises:
            T5Error: the files lack weights of the model that config.json describes, or hold others, or numbers that
                are not finite.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]  # of the model beside it
            *source, output_loading_info=True, **options
        )
        check_loaded(model, info, f"{source[0] if source else 'the checkpoint'}")
        return (model, info) if output_loading_info else model

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> None:
        raise T5Error(
            "an IP-Adapter adds an attention to every softmax attention, and those are converted; load it into the "
            "softmax pipeline (t5lib.revert of the transformer)"
        )


def check_loaded(model: ModelMixin, info: dict[str, Any], source: str) -> None:
    """Raises T5Error unless diffusers found every weight of `model`, no others, and all of them finite.

    Args:
        info: what its from_pretrained tells with output_loading_info.
    """
    ignored: list[str] = model._keys_to_ignore_on_load_unexpected or []
    missing = sorted(info["missing_keys"])
    unknown = [name for name in sorted(info["unexpected_keys"]) if not any(re.search(each, name) for each in ignored)]
    if missing or unknown or info["mismatched_keys"]:
        raise T5Error(
            f"the weights in {source} are not those of the {type(model).__name__} in its config.json: missing "
            f"{missing[:4]}, unknown {unknown[:4]}, other shapes {info['mismatched_keys'][:2]}; save or fetch it again"
        )
    check_numbers(dict(model.named_parameters()), source)


def converting_init(softmax_class: type[ModelMixin], adapter: Callable[[], "DiffusersAdapter"]) -> Callable[..., None]:
    """The `__init__` of a converted class: that of diffusers' class, with the argument `t5_config` besides.

    t5_config holds the settings of the new layers as plain values (t5lib.utils.config.to_dict), or None for softmax
    attention. `adapter` gives the family's, which is made after the class.
    """
    own = inspect.signature(softmax_class.__init__)
    new = inspect.Parameter("t5_config", inspect.Parameter.KEYWORD_ONLY, default=None)

    def init(self: ModelMixin, *args: Any, t5_config: dict[str, Any] | None = None, **named: Any) -> None:
        softmax_class.__init__(self, *args, **named)
        adapter().convert_as_told(self, t5_config)

    init.__signature__ = own.replace(parameters=[*own.parameters.values(), new])  # type: ignore[attr-defined]  # read by diffusers
    return register_to_config(init)


class DiffusersAdapter(Adapter):
    """What the denoisers of diffusers share: a PatchEmbed called `pos_embed`, blocks in `transformer_blocks`.

    A subclass says where the attentions are.

    Attributes:
        softmax_class: of the models, diffusers' own; converted_class: a subclass whose config.json tells the layers.
        attention_class, processors: of attentions that are plain softmax; layer_class: of those that take their place.
        mlps: names of a block's MLPs.
        tokens_from, tokens_to: names of the submodule that makes the image's tokens (B, N, C) for the blocks, and of
            the last one that treats each of them by itself.
        angles_from: name of the submodule that makes the angles of rotary positions; None if there are none.
    """

    package = "diffusers"
    input_name = "hidden_states"
    compiled_by_block = True
    softmax_class: ClassVar[type[ModelMixin]]
    converted_class: ClassVar[type[ModelMixin]]
    attention_class: ClassVar[type[nn.Module]] = Attention
    layer_class: ClassVar[type[DiffusersTTTAttention]] = DiffusersTTTAttention
    processors: ClassVar[tuple[type, ...]]
    mlps: ClassVar[tuple[str, ...]] = ("ff", "ff_context")
    tokens_from: ClassVar[str] = "pos_embed"
    tokens_to: ClassVar[str] = "proj_out"
    angles_from: ClassVar[str | None] = None

    @abstractmethod
    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        """Arguments of the forward besides latents, with their sizes after the batch's: a number, or "T" for any."""

    def check_convertible(self, model: nn.Module) -> None:
        if type(model) not in (self.softmax_class, self.converted_class):
            name = self.softmax_class.__name__
            raise T5Error(f"{type(model).__name__} wraps or subclasses diffusers' {name}; pass the original")
        if "forward" in vars(model):
            raise T5Error(
                f"the forward of this {type(model).__name__} is not that of its class (offloading, a cache, a patch); "
                "take that off (pipe.remove_all_hooks()), convert, then turn it on again"
            )
        self.check_blocks(model)
        for name in self.attention_names(model):
            check_attention(model.get_submodule(name), name, self.attention_class, self.processors)

    def check_blocks(self, model: nn.Module) -> None:
        """Raises T5Error when a block is of a kind that is not known."""

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        return model.transformer_blocks

    def sees_text(self, attention: nn.Module) -> bool:
        return attention.add_k_proj is not None

    def block_tokens(self, output: Any) -> Tensor:
        """The image's come after the text's."""
        return output[-1] if isinstance(output, tuple) else output

    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        return TokenGrid(*latent_grid(model.pos_embed, inputs[self.input_name]))

    def embedding(self, model: nn.Module) -> nn.Module:
        return model.pos_embed

    @staticmethod
    def announce(embedding: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        tell_grid(embedding, *latent_grid(embedding, arguments[0]))

    def new_layer(self, model: nn.Module, attention: nn.Module, config: TTTConfig) -> DiffusersTTTAttention:
        return self.layer_class(attention, config)

    def softmax_attention(self, layer: DiffusersTTTAttention) -> nn.Module:
        attention = nn.Module.__new__(layer.softmax_class)
        attention.__dict__.update(layer.settings, _modules={name: getattr(layer, name) for name in layer.order})
        return attention.train(layer.training)

    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        if inherit == "all":
            return []
        roots = (name,) if inherit == "mlp" else tuple(f"{self.block_name(name)}.{mlp}" for mlp in self.mlps)
        parts = [(root, module) for root, module in model.named_modules() if root in roots]
        for _, part in parts:
            for module in part.modules():
                _restart(module)
        return [f"{root}.{parameter}" for root, part in parts for parameter, _ in part.named_parameters()]

    def mark(self, model: nn.Module, config: TTTConfig) -> None:
        """Make `model` one of the converted class, in place, whose config.json will describe its layers."""
        model.__class__ = self.converted_class
        model.register_to_config(t5_config=to_dict(config))
        super().mark(model, config)

    def unmark(self, model: nn.Module) -> None:
        self.restore_class(model, {name: value for name, value in model.config.items() if name != "t5_config"})
        super().unmark(model)

    def restore_class(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Give `model` back the class and the `config` that it had before conversion."""
        model.__class__ = self.softmax_class
        model._internal_dict = FrozenDict(config)

    def watch(
        self, attention: nn.Module, calls: dict[str, AttentionCall], outputs: dict[str, Tensor], name: str
    ) -> list[RemovableHandle]:
        heads: dict[str, Tensor] = {}

        def keep_input(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            calls[name] = self.call_of(*arguments, **named)

        def keep_heads(part: str):
            def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                heads[part] = arguments[0]

            return keep

        def keep_output(*_: Any) -> None:
            parts = [heads.pop(part) for part in ("image", "text") if part in heads]
            outputs[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

        handles = [
            attention.register_forward_pre_hook(of_this_thread(keep_input), with_kwargs=True),
            attention.to_out[0].register_forward_pre_hook(of_this_thread(keep_heads("image"))),
            attention.register_forward_hook(of_this_thread(keep_output)),
        ]
        if attention.to_add_out is not None:
            handles.append(attention.to_add_out.register_forward_pre_hook(of_this_thread(keep_heads("text"))))
        return handles

    def call_of(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_others: Any
    ) -> AttentionCall:
        """What of the arguments of an attention matters."""
        text = () if encoder_hidden_states is None else (encoder_hidden_states,)
        return AttentionCall((hidden_states, *text))

    def project(self, attention: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        image, *text = projected(attention, call)
        if not text:
            return image
        q, k, v = (torch.cat(both, dim=2) for both in zip(image, text[0], strict=True))
        return q, k, v

    def projections(self, layer: nn.Module) -> list[nn.Module]:
        parts = (getattr(layer, name, None) for name in (*IMAGE, *TEXT))
        return [part for part in parts if part is not None]

    def own_angles(self, angles: Any, grid: RowsOfGrid) -> Any:
        """The part of the angles that this process needs, which has some rows of the image and all of the text."""
        raise NotImplementedError

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        expected = self.conditions(model)
        if missing := [name for name in expected if inputs.get(name) is None]:
            raise T5Error(
                f"a batch for {type(model).__name__} lacks {', '.join(missing)}; expected its keyword "
                f"arguments {', '.join((self.input_name, *expected))}, which "
                "t5lib.training.objectives.noised_inputs makes"
            )
        for name, sizes in expected.items():
            came = inputs[name].shape[1:]
            if len(came) != len(sizes) or any(w not in (c, "T") for c, w in zip(came, sizes, strict=True)):
                what = ", ".join(map(str, ("B", *sizes)))
                raise T5Error(f"{name} of a batch is {tuple(inputs[name].shape)}; this model takes ({what})")
        steps = inputs["timestep"]
        if not 0 <= steps.min() <= steps.max() <= LONGEST_SCHEDULE:
            raise T5Error(
                f"timestep goes from {steps.min().item():g} to {steps.max().item():g}; expected numbers from 0 to what "
                f"the model's noise schedule has, 1,000 as a rule and never more than {LONGEST_SCHEDULE:,}"
            )
        patch, most = self.patch(model), model.config.get("pos_embed_max_size") or LARGEST
        for side in inputs[self.input_name].shape[-2:]:
            check_multiple(side, patch, "the patch size")
            if not 0 < side <= most * patch:
                raise T5Error(f"latents are {side} wide or high; the model takes {patch} to {most * patch}")
        super().check_inputs(model, inputs)

    def patch(self, model: nn.Module) -> int:
        """Latents that a token is wide."""
        return model.config.patch_size

    def in_channels(self, model: nn.Module) -> int:
        return model.config.in_channels

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return model(**inputs, return_dict=False)[0]

    def num_tokens(self, model: nn.Module, inputs: Inputs) -> int:
        grid, text = self.grid(model, inputs), inputs.get("encoder_hidden_states")
        return grid.rows * grid.columns + (0 if text is None else text.shape[1])

    def check_resolution(self, model: nn.Module, size: ExampleSize) -> None:
        self._latent_side(model, size)

    def at_resolution(self, model: nn.Module, size: ExampleSize) -> nn.Module:
        self.check_resolution(model, size)
        return copy.deepcopy(model).eval()

    def example_inputs(self, model: nn.Module, size: ExampleSize) -> Inputs:
        generator, side = torch.Generator().manual_seed(0), self._latent_side(model, size)
        latents = torch.randn(size.batch, self.in_channels(model), side, side, generator=generator)
        inputs = {"hidden_states": latents, "timestep": torch.randint(1000, (size.batch,), generator=generator)}
        return inputs | self.example_conditions(model, size, generator)

    @abstractmethod
    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        """Random values of what the model is conditioned on."""

    def _latent_side(self, model: nn.Module, size: ExampleSize) -> int:
        patch = self.patch(model)
        what = f"what a patch covers ({patch} latents of {size.pixels_per_latent} pixels),"
        check_multiple(size.resolution, size.pixels_per_latent * patch, what)
        side, most = size.resolution // size.pixels_per_latent, (model.config.get("pos_embed_max_size") or 0) * patch
        if most and side > most:
            raise T5Error(
                f"resolution {size.resolution} gives latents of {side}, but the model's positions (pos_embed_max_size) "
                f"end at {most}; measure up to {most * size.pixels_per_latent} pixels"
            )
        return side

    def describe(self, model: nn.Module) -> tuple[str, dict[str, Any]]:
        """The name of diffusers' class, and its arguments."""
        arguments = {n: value for n, value in model.config.items() if not n.startswith("_") and n != "t5_config"}
        return self.softmax_class.__name__, arguments

    def build(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        if architecture != self.softmax_class.__name__:
            raise T5Error(f"expected the architecture {self.softmax_class.__name__}, got '{architecture}'")
        if config is None and self.holds(arguments):
            return self.softmax_class(**arguments)
        return self.converted_class(**arguments | {"t5_config": to_dict(config) if config else None})

    def holds(self, arguments: dict[str, Any]) -> bool:
        """Whether diffusers' own class takes these arguments."""
        return True

    def skeleton(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        """See Adapter; parameters are on the meta device, buffers (not all of which are saved) are made."""
        with init_empty_weights():
            return self.build(architecture, arguments, config)

    def fresh(self, model: nn.Module, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.build(*self.describe(model), None).to(next(model.parameters()))

    def convert_as_told(self, model: nn.Module, told: dict[str, Any] | None) -> None:
        """Convert a model that diffusers is making, as the entry t5_config of its config.json says."""
        if told:
            convert_as_told(self, model, told)


def latent_grid(embedding: nn.Module, latents: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens that diffusers' PatchEmbed makes of latents (B, C, h, w)."""
    height, width = latents.shape[-2:]
    return height // embedding.patch_size, width // embedding.patch_size


def _restart(module: nn.Module) -> None:
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    place = next(iter(own.values())).device
    start = place if place.type == "meta" else torch.device("cpu")  # drawn there, a conversion is repeatable anywhere
    for parameter, value in own.items():
        setattr(module, parameter, nn.Parameter(torch.ones_like(value, device=start)))
    if hasattr(module, "reset_parameters"):  # norms have none; they start at one
        module.reset_parameters()
    module.to(place)
