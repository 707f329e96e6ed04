"""Ops of the Test-Time-Training layer and of what is mixed with it; each folder holds one op: `api.py` chooses,
`reference.py` defines."""

from t5kernels.linear_attention.api import linear_attention
from t5kernels.neighborhood.api import circular_attention, neighborhood_attention
from t5kernels.ttt.api import INNER_LOSSES, INNER_WEIGHTS, ttt, ttt_accumulate, ttt_apply
from t5kernels.ttt_layer.api import Grid, RmsNorms, Settings, ttt_layer, ttt_prepare
from t5kernels.ttt_layer.key_norm import KEY_NORMS, OVER_TOKENS, KeyStatistics, key_norm
from t5kernels.ttt_layer.reference import convolved

__all__ = [
    "INNER_LOSSES",
    "INNER_WEIGHTS",
    "KEY_NORMS",
    "OVER_TOKENS",
    "Grid",
    "KeyStatistics",
    "RmsNorms",
    "Settings",
    "circular_attention",
    "convolved",
    "key_norm",
    "linear_attention",
    "neighborhood_attention",
    "ttt",
    "ttt_accumulate",
    "ttt_apply",
    "ttt_layer",
    "ttt_prepare",
]
