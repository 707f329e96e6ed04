"""What the families of diffusers share whose models take packed latents: 2 × 2 of them are one token.

Their forward is called with tokens and does not see the size of the image; an argument beside them says it. The
library calls them with latents (B, C, h, w), as it calls all denoisers: `PackedLatentsAdapter.call` packs them, and
unpacks what the model gives.

Shapes: B latents of C channels, h × w; N image tokens, T text tokens, D head width.
"""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.families.base import AttentionCall
from t5lib.families.diffusers_attention import DiffusersTTTAttention
from t5lib.families.diffusers_base import DiffusersAdapter
from t5lib.families.inputs import Inputs
from t5lib.layers.grid import TokenGrid, carry_grid, current_grid, drop_grid, grid_scope, one_pass, tell_grid
from t5lib.layers.split import RowsOfGrid
from t5lib.utils.errors import T5Error

SIDE = 2  # latents that a token is wide
GUIDANCE = 3.5  # the default of pipelines whose model is told it
STEPS = 1000  # the library counts noise levels in so many steps; these models take them from 0 to 1


class RotaryJointTTTAttention(DiffusersTTTAttention):
    """Replaces a joint attention with rotary positions, over image and text apart or in one sequence.

    In one sequence the text comes first. Queries and keys are turned as they were for softmax, and everything else
    comes after it (docs/method.md). A subclass says how its model hands on the angles.
    """

    @staticmethod
    @abstractmethod
    def table(angles: Any, tokens: int) -> Tensor:
        """AttentionCall.rope, (N + T, 2·D), of what the attention is called with as `image_rotary_emb`.

        Args:
            tokens: N.
        """

    @staticmethod
    @abstractmethod
    def angles(table: Tensor, tokens: int) -> Any:
        """What `table` was made of."""

    @staticmethod
    @abstractmethod
    def own_angles(angles: Any, grid: RowsOfGrid) -> Any:
        """From the angles of image and text, those of the text and of this process's part of the image."""

    @classmethod
    def call_of(cls, x: Tensor, text: Tensor | None, angles: Any, grid: TokenGrid) -> AttentionCall:
        """The call on x (B, N, C) and text (B, T, C), or on both in x (B, T + N, C)."""
        tokens = image_and_text(x, grid) if text is None else (x, text)
        return AttentionCall(tokens, cls.table(angles, tokens[0].shape[1]))

    def forward(  # type: ignore[override]  # as the softmax attentions are called, which differ too
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: TokenGrid | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See DiffusersTTTAttention. `image_rotary_emb`: the angles, as the model makes them."""
        self.check_call(hidden_states, encoder_hidden_states, attention_mask, others)
        grid = self.grid(grid)
        call = self.call_of(hidden_states, encoder_hidden_states, image_rotary_emb, grid)
        image, text = self.mixed(call, grid)
        return torch.cat((text, image), dim=1) if encoder_hidden_states is None else (image, text)


class PackedLatentsAdapter(DiffusersAdapter):
    """A model of packed latents, all of whose attentions are joint. The forward of its converted class tells the grid
    (`telling_its_grid`)."""

    layer_class: ClassVar[type[RotaryJointTTTAttention]]
    angles_from = "pos_embed"

    @abstractmethod
    def places(self, inputs: Inputs, grid: TokenGrid) -> dict[str, Any]:
        """The arguments by which a forward learns where tokens lie."""

    def patch(self, model: nn.Module) -> int:
        return SIDE

    def in_channels(self, model: nn.Module) -> int:
        return model.config.in_channels // SIDE**2

    def grid(self, model: nn.Module, inputs: Inputs) -> TokenGrid:
        height, width = inputs[self.input_name].shape[-2:]
        return TokenGrid(height // SIDE, width // SIDE)

    def carry_grid(self, model: nn.Module) -> None:
        for blocks in self.block_lists(model):
            carry_grid(blocks)

    def drop_grid(self, model: nn.Module) -> None:
        for blocks in self.block_lists(model):
            drop_grid(blocks)

    def own_angles(self, angles: Any, grid: RowsOfGrid) -> Any:
        return self.layer_class.own_angles(angles, grid)

    def sees_text(self, attention: nn.Module) -> bool:
        return True

    def check_inputs(self, model: nn.Module, inputs: Inputs) -> None:
        """See Adapter; also that guidance is there if the model takes it, and only then."""
        told, kind = model.config.guidance_embeds, type(model).__name__
        if told and "guidance" not in inputs:
            raise T5Error(
                f"this {kind} takes a strength of guidance (guidance_embeds); the batch lacks 'guidance': "
                f"noise it by RectifiedFlow(guidance={GUIDANCE}), or noising_of(scheduler, guidance={GUIDANCE})"
            )
        if not told and "guidance" in inputs:
            raise T5Error(f"this {kind} takes no guidance (guidance_embeds); leave 'guidance' out of the batch")
        super().check_inputs(model, inputs)

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See Adapter; a softmax attention that is watched learns the grid here."""
        grid = self.grid(model, inputs)
        named = inputs | {self.input_name: packed(inputs[self.input_name]), "timestep": inputs["timestep"] / STEPS}
        with grid_scope(grid):
            return unpacked(model(**named, **self.places(inputs, grid), return_dict=False)[0], grid)

    def call_of(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any
    ) -> AttentionCall:
        angles = others["image_rotary_emb"]
        return self.layer_class.call_of(hidden_states, encoder_hidden_states, angles, current_grid())

    def call_attention(self, attention: nn.Module, call: AttentionCall) -> None:
        (image, text), table = call.tokens, call.rope
        assert table is not None
        angles = self.layer_class.angles(table, image.shape[1])
        if self.is_joined(attention):
            attention(torch.cat((text, image), dim=1), image_rotary_emb=angles)
        else:
            attention(image, encoder_hidden_states=text, image_rotary_emb=angles)

    def is_joined(self, attention: nn.Module) -> bool:
        """Whether image and text come in one sequence."""
        return False


def telling_its_grid(
    forward: Callable[..., Any], argument: str, grid_of: Callable[[Any], tuple[int, int]], *blocks: str
) -> Callable[..., Any]:
    """`forward` of a model, each call a pass (t5lib.layers.grid) whose grid follows from an argument.

    Args:
        argument: its name; grid_of: makes rows and columns of it.
        blocks: names of the containers of blocks.
    """
    place = list(inspect.signature(forward).parameters).index(argument) - 1  # after the model

    @functools.wraps(forward)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        told = args[place] if len(args) > place else kwargs.get(argument)
        tell_grid(model.pos_embed, *grid_of(told))
        return forward(model, *args, **kwargs)

    return one_pass(run, "pos_embed", *blocks)


def image_and_text(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """(B, N, C) and (B, T, C) of one sequence (B, T + N, C)."""
    text, image = x.tensor_split((x.shape[1] - grid.rows * grid.columns,), dim=1)
    return image, text


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, N, 4·C), row by row."""
    return F.pixel_unshuffle(latents, SIDE).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """Tokens (B, N, 4·C) to (B, C, h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid.rows, grid.columns)), SIDE)
