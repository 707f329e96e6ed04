"""The layer that takes the place of softmax attention: inherited projections around a mixer.

Shapes: B images, N tokens, C channels, H heads, D head width.
"""

from torch import Tensor, nn

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid, current_grid
from t5lib.layers.mixers import Mixer
from t5lib.utils.config import shown
from t5lib.utils.errors import T5Error


class TTTLayer(nn.Module):
    """What the converted layers of all families have in common: inherited parts around a mixer.

    A family's own subclass takes over the parts of a softmax attention under their names, the very modules, and adds a
    mixer (`add_mixer`). Its forward is called, and returns, as the attention did. It takes `grid=None` besides and does

        grid = self.grid(grid)
        q, k, v = its projections of self.mixer.prepare(x, grid)
        the inherited output projection of self.mixer(q, k, v, grid)

    Attributes:
        inherited: names of the parts taken over from the softmax attention (None where it has none).
        num_heads, head_dim: of the layer.
        num_prefix_tokens: class and register tokens of the model, which come before the grid's.
        mixer: holds every new parameter.
    """

    inherited: tuple[str, ...]
    num_heads: int
    head_dim: int
    num_prefix_tokens: int
    mixer: Mixer

    def grid(self, given: TokenGrid | None) -> TokenGrid:
        """The layout of the image's tokens in this call: `given`, or that of the running forward.

        Raises:
            T5Error: `given` is something else, or nothing tells the layout.
        """
        if not isinstance(given, TokenGrid | None):
            raise T5Error(f"grid is {shown(given)}; expected TokenGrid(rows, columns, num_prefix_tokens)")
        return given or current_grid(self.num_prefix_tokens)

    def __prepare_scriptable__(self) -> "TTTLayer":
        """What torch.jit.script calls first."""
        raise T5Error("a TTT layer is no TorchScript; use torch.export or torch.compile (or revert the model)")

    def add_mixer(self, config: TTTConfig, like: nn.Linear) -> None:
        """Make the mixer, in the precision and the place of `like`, the projection of queries.

        Raises:
            T5Error: locality "cpe" convolves the layer's input as if it were heads, and their widths differ.
        """
        width = self.num_heads * self.head_dim
        if config.convolution == "cpe" and like.in_features != width:
            raise T5Error(
                f"locality 'cpe' convolves the layer's input, of {like.in_features} channels, but the heads hold "
                f"{self.num_heads} x {self.head_dim}; use 'dwc_qk' for this model"
            )
        self.mixer = make_mixer(self.num_heads, self.head_dim, config).to(like.weight)


class TTTAttention(TTTLayer):
    """Takes over the projections of a timm `Attention` and mixes tokens with a Mixer.

    Parameters keep their names (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`); all new ones are under `mixer`.
    The modules of `attention` are shared, not copied.

    Args:
        attention: the timm.layers.Attention to replace.
        config: of this layer.
        num_prefix_tokens: of the model.
    """

    inherited = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    def __init__(self, attention: nn.Module, config: TTTConfig, num_prefix_tokens: int):
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.softmax = {name: getattr(attention, name) for name in ("scale", "fused_attn")}  # for who reverts it
        for name in self.inherited:
            setattr(self, name, getattr(attention, name, None))
        self.add_mixer(config, self.qkv)
        self.train(attention.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: TokenGrid | None = None
    ) -> Tensor:
        """x: (B, N, C), prefix tokens first. Returns (B, N, C). `grid`: where x lies, for a call outside of a model.

        Raises:
            T5Error: a mask is given (a linear layer has no map to mask), or the tokens do not fit the grid.
        """
        if attn_mask is not None or is_causal:
            raise T5Error("a TTT layer sees all tokens: attn_mask and is_causal are not supported; call without them")
        grid = self.grid(grid)
        q, k, v = project(self, self.mixer.prepare(x, grid))
        return self.merge(self.mixer(q, k, v, grid), x)

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, N, D) to (B, N, C) through the pretrained norm, gate and output projection; x gates."""
        o = self.norm(o.transpose(1, 2).flatten(2))
        if self.gate is not None:
            o = o * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(o))


def project(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, C) to q, k, v, each (B, H, N, D), with the pretrained q and k norms of a timm or TTT attention."""
    heads = (3, attention.num_heads, attention.head_dim)
    q, k, v = attention.qkv(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v
