"""A TTT layer in the place of an attention of diffusers, of an image alone or joint with text.

Shapes: B latents, N image tokens, T text tokens, C channels, H heads, D head width.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from t5kernels import RmsNorms
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.families.base import AttentionCall
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid, current_grid, grid_scope
from t5lib.layers.mixers import Tokens, softmax_attention
from t5lib.layers.rotary import rotated
from t5lib.layers.split import Split
from t5lib.utils.errors import T5Error

_log = logging.getLogger(__name__)
IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
SEEN = {"ip_hidden_states", "ip_adapter_masks"}  # of adapters: what an attention would see besides its tokens
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class DiffusersTTTAttention(TTTLayer):
    """Takes over the parts of an attention of diffusers, of an image alone or joint with text, and mixes with a Mixer.

    Parameters keep their names (`to_q`, `norm_q`, `add_q_proj`, `to_out`, …); all new ones are under `mixer`. The
    modules of `attention` are shared, not copied.

    Args:
        attention: to replace, as SD3 and DiT use it (check_attention).
        config: of this layer.

    Attributes:
        norms_eps: of all norms of q and k, where they are plain RMS norms with gains; None where they are not.
        softmax_class, settings, order: the class of `attention`, its plain values and the names of its parts, for who
            reverts it.
    """

    inherited = (*IMAGE, *TEXT, "to_out", "to_add_out")
    num_prefix_tokens = 0

    def __init__(self, attention: nn.Module, config: TTTConfig):
        super().__init__()
        self.num_heads, self.head_dim = attention.heads, attention.to_q.out_features // attention.heads
        self.context_pre_only = attention.context_pre_only
        self.softmax_class = type(attention)
        self.order = tuple(attention._modules)
        self.settings = {name: value for name, value in vars(attention).items() if name != "_modules"}
        for name in self.inherited:
            setattr(self, name, getattr(attention, name, None))
        self.norms_eps = _common_eps(
            [getattr(self, name) for name in (*IMAGE[3:], *(TEXT[3:] if self.add_k_proj else ()))]
        )
        self.add_mixer(config, self.to_q)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid: TokenGrid | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states (B, N, C), and text (B, T, C) in a joint attention. Returns the same, or both.

        Args:
            grid: where hidden_states lie, for a call outside of a model.
            others: ignored, as by diffusers' own.

        Raises:
            T5Error: a mask, an adapter's tokens, or text where there are no projections for it is given; the tokens do
                not fit the grid; or the new weights are on another device.
        """
        self.check_call(hidden_states, encoder_hidden_states, attention_mask, others)
        text = () if encoder_hidden_states is None else (encoder_hidden_states,)
        return self.mixed(AttentionCall((hidden_states, *text), None), self.grid(grid))

    def check_call(self, x: Tensor, text: Tensor | None, mask: Tensor | None, others: dict[str, Any]) -> None:
        """Raises T5Error when the layer cannot do what it is called with; `others` only cause a warning."""
        # torch.compile of torch 2.11 cannot trace a set together with the keys of a dict.
        if mask is not None or any(name in SEEN for name in others):
            given = ["attention_mask"] * (mask is not None) + sorted(SEEN.intersection(others))
            raise T5Error(f"a TTT layer sees all tokens and no others; call it without {', '.join(given)}")
        if others:  # as diffusers' own do with what their processor does not take
            _log.warning("a TTT layer does not take %s, which is ignored", ", ".join(others))
        if text is not None and self.add_k_proj is None:
            raise T5Error("a TTT layer that replaces self-attention sees its own tokens only; call it without others")
        # In a compiled model each parameter that is looked at here would be checked in every call.
        away = None if torch.compiler.is_compiling() else next(self.mixer.parameters(), x).device
        if away not in (None, x.device):
            raise T5Error(
                f"a TTT layer's new weights are on {away}, its input on {x.device}: offloading part by part "
                "leaves them behind; use enable_model_cpu_offload, or group offloading of whole blocks"
            )

    def mixed(self, call: AttentionCall, grid: TokenGrid) -> Tensor | tuple[Tensor, Tensor]:
        """The image's tokens (B, N, C), and the text's (B, T, C) where there are any, through all of the layer."""
        image, *text = call.tokens
        call = call.of(self.mixer.prepare(image, grid), *text)
        alone = self.split is None
        norms = self._norms(text) if call.rope is None and alone else {}  # rotation comes after norms
        parts = projected(self, call, normed=not norms)
        return _output(self, *self.mixer.joint(parts[0], parts[1] if text else None, grid, **norms))

    def _norms(self, text: Sequence[Tensor]) -> dict[str, RmsNorms]:
        """The q and k norms where the mixer does them, of image and text; nothing where modules do."""
        if self.norms_eps is None or not self.mixer.takes_norms:
            return {}
        of_text = (self.norm_added_q.weight, self.norm_added_k.weight) if text else None
        return {"norms": RmsNorms((self.norm_q.weight, self.norm_k.weight), of_text, self.norms_eps)}


class RowsAttention:
    """A processor of diffusers: softmax attention for processes that each have some rows of the image and all the text.

    A process has its own queries, and fetches the keys and values of all.

    Args:
        split: how the rows are shared.
        call_of: the family's DiffusersAdapter.call_of.
    """

    def __init__(self, split: Split, call_of: Callable[..., AttentionCall]):
        self.split, self.call_of = split, call_of

    def __call__(
        self,
        attention: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, N, C) of this process, and the text's (B, T, C); returns the same, or both.

        Args:
            image_rotary_emb: angles, as the family has them.
            encoder_hidden_states_mask: (B, T) bool, true for text, false for padding.

        Raises:
            T5Error: a mask is given.
        """
        if attention_mask is not None:
            raise T5Error("an attention whose image several processes share takes no attention_mask; call it without")
        grid = self.split.part(current_grid())
        with grid_scope(grid):
            call = self.call_of(hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)
        (q, k, v), *text = projected(attention, call)
        k, v = grid.gathered(k, v)
        for of_text in text:
            q, k, v = (torch.cat(both, dim=2) for both in zip((q, k, v), of_text, strict=True))
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = F.pad(mask, (k.shape[2] - mask.shape[1], 0), value=True)[:, None, None]
        o, text_o = softmax_attention(q, k, v, mask).tensor_split((grid.rows * grid.columns,), dim=2)
        out = _output(attention, o, text_o if text else None)
        if isinstance(out, tuple) and encoder_hidden_states is None:  # they came in one sequence, text first
            return torch.cat(out[::-1], dim=1)
        return out


def _common_eps(norms: list[nn.Module | None]) -> float | None:
    """That of RMS norms with gains alone, all alike; None if there is another among them."""
    plain = [norm for norm in norms if type(norm) is RMSNorm and norm.weight is not None and norm.bias is None]
    eps = {norm.eps for norm in plain}
    return eps.pop() if len(plain) == len(norms) and len(eps) == 1 else None


def check_attention(attention: nn.Module, name: str, kind: type[nn.Module], processors: tuple[type, ...]) -> None:
    """Raises T5Error unless `attention`, called `name`, is one of diffusers' class `kind` with plain softmax."""
    if isinstance(attention, TTTLayer):
        raise T5Error(f"{name} is converted already; call t5lib.revert first")
    if type(attention) is not kind:
        raise T5Error(f"{name} is {type(attention).__name__}; only diffusers' {kind.__name__} can be converted")
    if attention.fused_projections:
        raise T5Error(f"the projections of {name} are fused; call unfuse_qkv_projections() first")
    if hasattr(attention, "_hf_hook"):
        raise T5Error(f"{name} is offloaded part by part; convert first, then turn offloading on")
    if type(attention.processor) not in processors:
        expected = " or ".join(each.__name__ for each in processors)
        raise T5Error(
            f"{name} has the processor {type(attention.processor).__name__}, whose attention a TTT layer has no "
            f"counterpart for; expected {expected}: take adapters (IP-Adapter, PAG, …) off first"
        )


def _output(attention: nn.Module, o: Tensor, text_o: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Heads (B, H, N, D), and the text's (B, H, T, D) if any, merged, and put through the output projections if any."""
    o = _merged(o)
    to_out = getattr(attention, "to_out", None)
    if to_out is not None:
        projection, dropout = to_out[0], to_out[1]  # torch.compile takes a loop over them for a list that may change
        o = dropout(projection(o))
    if text_o is None:
        return o
    to_add_out = getattr(attention, "to_add_out", None)
    return o, _merged(text_o) if to_add_out is None else to_add_out(_merged(text_o))


def _merged(o: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H·D)."""
    return o.transpose(1, 2).flatten(2)


def projected(attention: nn.Module, call: AttentionCall, normed: bool = True) -> list[Tokens]:
    """q, k and v (B, H, N, D) of the image's tokens, and of the text's (B, H, T, D) where there are any, rotated.

    Args:
        attention: a softmax attention or a TTT layer. Where it has no projections for text, the image's serve both.
        normed: whether the q and k norms are done here.
    """
    own_text = getattr(attention, "add_k_proj", None) is not None
    parts, start = [], 0
    for x, of_text in zip(call.tokens, (False, own_text), strict=False):
        q, k, v = _project(attention, x, of_text, normed)
        if call.rope is not None:
            rows = call.rope[start : start + x.shape[1]]
            q, k = (rotated(t, rows, num_prefix_tokens=0, half=False) for t in (q, k))
        parts.append((q, k, v))
        start += x.shape[1]
    return parts


def _project(attention: nn.Module, x: Tensor, of_text: bool, normed: bool) -> Tokens:
    """q, k and v (B, H, N, D) of x (B, N, C), by the projections of the text or of the image, and their norms."""
    if of_text:
        projections = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        norm_q, norm_k = attention.norm_added_q, attention.norm_added_k
    else:
        projections = (attention.to_q, attention.to_k, attention.to_v)
        norm_q, norm_k = attention.norm_q, attention.norm_k
    heads = getattr(attention, "heads", None) or attention.num_heads
    q, k, v = (to(x).unflatten(-1, (heads, -1)).transpose(1, 2) for to in projections)
    if not normed:
        return q, k, v
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
