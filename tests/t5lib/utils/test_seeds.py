"""Every training draws what it would draw with Accelerate's seeds."""

import random

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed

from t5lib.utils.seeds import own_random_states, seed_everything


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_all_generators_draw_what_follows_from_the_seed(seed):
    with own_random_states():
        set_seed(seed)
        expected = draws()
        draws()
        seed_everything(seed)
        assert draws() == expected
