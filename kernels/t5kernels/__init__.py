"""Ops of the Test-Time-Training layer and of what is mixed with it; each folder holds one op: `api.py` chooses,
`reference.py` defines."""

from t5kernels.linear_attention.api import linear_attention
from t5kernels.neighborhood.api import circular_attention, neighborhood_attention
from t5kernels.ttt.api import INNER_LOSSES, INNER_WEIGHTS, ttt, ttt_accumulate, ttt_apply

__all__ = [
    "INNER_LOSSES",
    "INNER_WEIGHTS",
    "circular_attention",
    "linear_attention",
    "neighborhood_attention",
    "ttt",
    "ttt_accumulate",
    "ttt_apply",
]
