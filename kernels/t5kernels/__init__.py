"""Ops of the Test-Time-Training layer; each folder holds one op: `api.py` chooses, `reference.py` defines."""

from t5kernels.ttt.api import INNER_LOSSES, INNER_WEIGHTS, ttt

__all__ = ["INNER_LOSSES", "INNER_WEIGHTS", "ttt"]
