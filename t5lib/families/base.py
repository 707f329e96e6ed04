"""What t5lib has to know about a family of models, all of it: one subclass of Adapter a family, one file each."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t5lib.families.inputs import ExampleSize, Inputs, images_of, rows_of
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, carry_grid, drop_grid
from t5lib.utils.errors import T5Error

Tokens = tuple[Tensor, ...]  # the image's (B, N, C), and in a joint attention the text's (B, T, C)


@dataclass(frozen=True)
class AttentionCall:
    """What an attention is called with: q, k and v follow from all of it, and from nothing else.

    Attributes:
        tokens: the image's (B, N, C), and in a joint attention the text's (B, T, C).
        rope: the rotary table of the image's patches, sines then cosines, (rows·columns, 2·D), or a table a head
            (H, rows·columns, 2·D); one for all images. Where text is turned too, its rows come after the image's,
            (rows·columns + T, 2·D). None where the attention is given no positions.
    """

    tokens: Tokens
    rope: Tensor | None = None

    def of(self, *tokens: Tensor) -> "AttentionCall":
        """This call with other tokens in the same places."""
        return AttentionCall(tokens, self.rope)


class Adapter(ABC):
    """A family of models: where its attentions are, how its tokens lie, how it is called, described and rebuilt.

    An adapter holds no model and no state; every method is given the model, or a part of it.

    Shapes: B images, N image tokens, T text tokens, C channels, H heads, D head width.

    Attributes:
        name: of the family, in t5.json of saved models.
        package: the library whose version matters to a saved model.
        input_name: the argument of the model's forward that holds images or latents (B, C, H, W).
        compiled_by_block: torch.compile takes the blocks one by one; they are large and alike, one compilation serves
            all of a kind. Otherwise it takes the model as a whole.
        features: name of the part that image tokens are read from, for dense tasks; None where the output says it all.
        has_attention_maps: an attention is over the tokens of one image and nothing else, so that where it looks can be
            shown on that image.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    input_name: ClassVar[str]
    compiled_by_block: ClassVar[bool] = False
    features: ClassVar[str | None] = None
    has_attention_maps: ClassVar[bool] = False

    # Where the attentions are.

    @abstractmethod
    def check_convertible(self, model: nn.Module) -> None:
        """Raises T5Error naming what in `model` cannot be converted, and why."""

    @abstractmethod
    def attention_names(self, model: nn.Module) -> list[str]:
        """Names of all attentions, in order; position i is layer i of TTTConfig.layers."""

    @abstractmethod
    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """What the names in TTTConfig.layers mean here: {"all": (0, 1, …), "paper": …}."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The blocks, in order: the container that the model's forward iterates, unless there are several."""

    def block_lists(self, model: nn.Module) -> list[Any]:
        """The containers, nn.Sequential or nn.ModuleList, that the model's forward iterates."""
        return [self.blocks(model)]

    def sees_text(self, attention: nn.Module) -> bool:
        """Whether the softmax attention is over the image's tokens and text."""
        return False

    def position_bias(self, model: nn.Module, name: str) -> list[str]:
        """Names of the parameters of `model` that make what the attention `name` adds to its softmax map.

        Without `drop_position_bias` such an attention is not converted; with it, they stay where they are, idle.
        """
        return []

    def block_name(self, attention: str) -> str:
        """The name of the block that the attention of that name is in."""
        return attention.rpartition(".")[0]

    def block_tokens(self, output: Any) -> Tensor:
        """The image's tokens (B, N, C) in what a block gives."""
        return output

    # How tokens lie, and how the layers learn it.

    @abstractmethod
    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        """Where the image's tokens lie in a forward pass on `inputs`; text is not in it.

        Raises:
            T5Error: images or latents of a size that the model cannot take.
        """

    def fixed_grid(self, model: nn.Module) -> TokenGrid | None:
        """The grid of a model that takes images of one size, None of one that takes any."""
        return None

    @abstractmethod
    def embedding(self, model: nn.Module) -> nn.Module:
        """The part that a forward calls with images or latents before it comes to its blocks."""

    @staticmethod
    @abstractmethod
    def announce(embedding: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        """A forward hook of `embedding` that says the grid of its input (t5lib.layers.grid.tell_grid)."""

    def carry_grid(self, model: nn.Module) -> None:
        """Let every forward of `model` hand its grid to its converted layers.

        Its class has to make a pass of every forward (t5lib.layers.grid.one_pass).
        """
        self.embedding(model).register_forward_hook(self.announce)
        for blocks in self.block_lists(model):
            carry_grid(blocks)

    def drop_grid(self, model: nn.Module) -> None:
        """Undo `carry_grid`."""
        hooks = self.embedding(model)._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self.announce]:
            del hooks[key]
        for blocks in self.block_lists(model):
            drop_grid(blocks)

    # Conversion.

    @abstractmethod
    def new_layer(self, model: nn.Module, attention: nn.Module, config: TTTConfig) -> TTTLayer:
        """The layer that takes the place of `attention`, a part of `model`."""

    @abstractmethod
    def softmax_attention(self, layer: TTTLayer) -> nn.Module:
        """The attention that a TTTLayer stands for, with its present parts (shared)."""

    @abstractmethod
    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        """Give a fresh start to what `inherit` leaves out around the attention `name`.

        Fresh tensors take the place of the pretrained ones, which stay as they are for who shares them.

        Args:
            inherit: "all" resets nothing, "attention" the block's MLPs, "mlp" the attention's projections.

        Returns:
            The full names of the parameters that were reset.
        """

    def mark(self, model: nn.Module, config: TTTConfig) -> None:
        """Make `model` known as converted."""
        model.t5_config = config

    def unmark(self, model: nn.Module) -> None:
        """Undo `mark`."""
        del model.t5_config, model.t5_report

    # Inside an attention.

    @abstractmethod
    def watch(
        self, attention: nn.Module, calls: dict[str, AttentionCall], outputs: dict[str, Tensor], name: str
    ) -> list[RemovableHandle]:
        """While the model runs, keep what `attention` gets and gives, under `name`.

        It is asked of softmax attentions and of new layers. Where the output projection is a module that the attention
        calls, the heads are what that module gets; where it is not, make them again from q, k and v.

        Args:
            calls: gets its tokens and positions.
            outputs: gets the merged heads (B, N, H·D), of a joint attention (B, N + T, H·D) unless it drops the text,
                as they are before output projections.

        Returns:
            Handles whose `remove` ends it.
        """

    @abstractmethod
    def project(self, attention: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a softmax attention or a TTTLayer, each (B, H, N + T, D), the image's tokens first.

        They are what softmax sees: normed and rotated, with as many heads of keys and values as of queries.
        """

    @abstractmethod
    def projections(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that make q, k and v of the input of `layer`, a softmax attention or a TTTLayer.

        That of the image's queries comes first and has `weight` and `in_features`, as nn.Linear. Their parameters are
        fitted, so they must be the model's own: where it keeps them packed in one, return an nn.Linear that shares it.
        """

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        """Run a softmax attention or a TTTLayer by itself; what it gives is read by `watch`."""
        attention(*call.tokens)

    # Calling a model.

    def inputs(self, batch: Any) -> Inputs:
        """What the model is called with for a batch.

        Args:
            batch: images (B, C, H, W), or a tuple or list that begins with them; or the keyword arguments themselves.

        Raises:
            T5Error: it is something else, empty, or of whole numbers, or the other arguments are not as many.
        """
        named = dict(batch) if isinstance(batch, Mapping) else {self.input_name: batch}
        if self.input_name not in named:
            raise T5Error(
                f"the model is called by name: expected '{self.input_name}' and what else the model's forward takes, "
                f"got {', '.join(map(repr, named))}. A denoiser's latents and captions are noised first: "
                "t5lib.training.objectives.noised_inputs"
            )
        images = images_of(named.pop(self.input_name))
        return {self.input_name: images} | rows_of(named, len(images))

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """Raises T5Error unless `model` can be called with `inputs`: their names, channels and size."""
        try:
            inspect.signature(model.forward).bind(**inputs)
        except TypeError as error:
            raise T5Error(f"the batch is not what {type(model).__name__} is called with: {error}") from None
        channels, wanted = inputs[self.input_name].shape[1], self.in_channels(model)
        if channels != wanted:
            raise T5Error(
                f"images of {channels} channels were given to a model that takes {wanted}; convert them first "
                "(a grey image to RGB: images.expand(-1, 3, -1, -1))"
            )
        self.grid(model, inputs)

    @abstractmethod
    def in_channels(self, model: nn.Module) -> int:
        """Channels of the images or latents that the model is called with."""

    @abstractmethod
    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's output as a tensor."""

    def tracing(self) -> AbstractContextManager:
        """Within, a model is traced; what its library computes of image sizes must not fix them."""
        return nullcontext()

    @abstractmethod
    def num_tokens(self, model: nn.Module, inputs: Inputs) -> int:
        """Tokens that attention sees in one image: patches, prefix tokens, text tokens."""

    @abstractmethod
    def check_resolution(self, model: nn.Module, size: ExampleSize) -> None:
        """Raises T5Error unless the resolution is a multiple of what a token covers, within the model's positions."""

    @abstractmethod
    def at_resolution(self, model: nn.Module, size: ExampleSize) -> nn.Module:
        """A copy of the model, in eval mode, for square images of that size; learned positions are resampled.

        Raises:
            T5Error: as `check_resolution` does.
        """

    @abstractmethod
    def example_inputs(self, model: nn.Module, size: ExampleSize) -> Inputs:
        """Random inputs of that size, float32 on the CPU; the same numbers every time."""

    # Whole models.

    @abstractmethod
    def describe(self, model: nn.Module) -> tuple[str, dict[str, Any]]:
        """A name and arguments that rebuild `model` as it was before conversion, weights aside.

        Raises:
            T5Error: they cannot be told from the model.
        """

    @abstractmethod
    def build(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        """The model of `describe`, with fresh weights and, given `config`, converted."""

    @abstractmethod
    def skeleton(self, architecture: str, arguments: dict[str, Any], config: TTTConfig | None) -> nn.Module:
        """Like `build`, but without weights, to load some into."""

    @abstractmethod
    def fresh(self, model: nn.Module, seed: int) -> nn.Module:
        """A model like `model`, in the same place, with the architecture's random initialization: a control.

        Raises:
            T5Error: none can be made.
        """


def check_multiple(resolution: int, unit: int, what: str) -> None:
    """Raises T5Error unless `resolution` is a multiple of `unit`, which is `what`."""
    if resolution % unit:
        nearest = max(1, round(resolution / unit)) * unit
        raise T5Error(f"resolution {resolution} is not a multiple of {what} {unit}; the nearest is {nearest}")
