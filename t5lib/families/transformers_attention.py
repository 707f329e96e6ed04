"""A TTT layer in the place of the attentions of transformers' vision models.

Shapes: B images, N tokens, C channels, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from t5lib.families.base import AttentionCall
from t5lib.layers.attention import TTTLayer, share_parts
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.rotary import rotated
from t5lib.utils.errors import T5Error

MASK = (
    "an attention_mask is given, and a TTT layer sees all tokens; call the model without it, with images of one size "
    "in a batch"
)
Positions = tuple[Tensor, Tensor]  # cosines and sines of the patches, each (rows·columns, D)


class TransformersTTTAttention(TTTLayer):
    """Takes over the projections of an attention of transformers, under their names, and mixes with a Mixer.

    All new parameters are under `mixer`. The parts of `attention` are shared, not copied.

    Args:
        attention: to replace (t5lib.families.transformers_towers.ATTENTIONS).
        output: name of its output projection.
        config: of this layer.
        num_prefix_tokens: of the model.

    Attributes:
        config: transformers' own, of the model.
        softmax_class, softmax, order: the class of `attention`, what it holds besides modules, and the order of those.
    """

    def __init__(self, attention: nn.Module, output: str, config: TTTConfig, num_prefix_tokens: int):
        super().__init__()
        self.head_dim, self.num_prefix_tokens = attention.head_dim, num_prefix_tokens
        self.num_heads = attention.q_proj.out_features // attention.head_dim
        self.config, self.output = attention.config, output
        self.softmax_class, self.order = type(attention), tuple(attention._modules)
        self.softmax = {name: value for name, value in vars(attention).items() if name not in ("_modules", "config")}
        self.inherited = ("q_proj", "k_proj", "v_proj", output)
        share_parts(attention, self, self.inherited)
        self.add_mixer(config, self.q_proj)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Positions | None = None,
        grid: TokenGrid | None = None,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, N, C), prefix tokens first. Returns the same, and None for a softmax map.

        Args:
            position_embeddings: by which queries and keys of the patches are turned.
            grid: where hidden_states lie, for a call outside of a model.

        Raises:
            T5Error: a mask is given, or the tokens do not fit the grid.
        """
        if attention_mask is not None and not is_tracing():  # then transformers makes one that hides nothing
            raise T5Error(MASK)
        grid = self.grid(grid)
        x = self.mixer.prepare(hidden_states, grid)
        o = self.mixer(*project(self, AttentionCall((x,), rope_of(position_embeddings))), grid)
        return getattr(self, self.output)(o.transpose(1, 2).flatten(2)), None

    def softmax_attention(self) -> nn.Module:
        """The attention that this layer stands for, with its present parts (shared)."""
        attention = nn.Module.__new__(self.softmax_class)
        modules = {name: getattr(self, name) for name in self.order}
        attention.__dict__.update(self.softmax, config=self.config, _modules=modules)
        return attention.train(self.training)


def project(attention: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, H, N, D), of a softmax attention or the layer in its place."""
    [x] = call.tokens
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (each(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for each in projections)
    if call.rope is not None:
        known = getattr(attention, "num_prefix_tokens", None)  # of a layer; when sizes are free, it must be a number
        prefix = x.shape[1] - call.rope.shape[-2] if known is None else known
        q, k = (rotated(t, call.rope, prefix, half=True) for t in (q, k))
    return q, k, v


def rope_of(positions: Positions | None) -> Tensor | None:
    """The rotary table of an AttentionCall."""
    return None if positions is None else torch.cat(positions[::-1], dim=-1)


def positions_of(rope: Tensor | None) -> Positions | None:
    """What transformers calls an attention with, of a rotary table."""
    if rope is None:
        return None
    sines, cosines = rope.chunk(2, dim=-1)
    return cosines, sines
