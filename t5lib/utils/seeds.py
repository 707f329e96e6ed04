"""The one way in which random streams follow from a seed: by what they are for, never by what was drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    import numpy as np


def check_seed(seed: int) -> int:
    """`seed`. Raises T5Error unless it is a whole number from 0 to 2⁶³ - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise T5Error(f"seed is {seed!r}; expected a whole number, 0 or more and less than 2**63")
    return seed


@contextmanager
def own_random_states() -> Iterator[None]:
    """Within, or in a function that it decorates, the global random states of Python, NumPy and torch may be seeded and
    drawn from; afterwards they go on where they were."""
    import numpy as np
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def derived_seed(*key: int) -> int:
    """A 64-bit seed that follows from these numbers (a seed, what it is for, epoch, batch …) and from no others."""
    import numpy as np  # here: commands that only read prompts or settings start without it

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def numpy_generator(*key: int) -> "np.random.Generator":
    """A generator of its own for these numbers (`derived_seed`)."""
    import numpy as np

    return np.random.default_rng(derived_seed(*key))
