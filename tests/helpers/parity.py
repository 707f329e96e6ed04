"""What the method's released layers gave, and our layers of the same shape."""

import os
from pathlib import Path

import torch
from timm.layers import Attention

from t5lib.layers.attention import TTTAttention
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid

FOLDER = Path(os.environ.get("T5_PARITY_DIR") or Path(__file__).parents[1] / "data/parity")
CASES = sorted(FOLDER.glob("*.npz"))


def build(case: dict, num_heads: int, *, residual: bool) -> TTTAttention:
    channels = case["x"].shape[2]
    config = TTTConfig(
        inner="swiglu" if "param.w3" in case else "two_layer",
        inner_loss="residual" if residual else "dot",
        locality="dwc_qk" if "param.q_conv2d.weight" in case else "none",
    )
    attention = Attention(channels, num_heads, qkv_bias="param.qkv.bias" in case).double()
    return TTTAttention(attention, config, 0)


def grid_of(x: torch.Tensor) -> TokenGrid:
    """The square grid of tokens x (B, N, C)."""
    side = int(x.shape[1] ** 0.5)
    return TokenGrid(side, side)
