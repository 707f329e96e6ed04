"""The one way in which random streams follow from a seed: by what they are for, never by what was drawn before."""

from typing import TYPE_CHECKING

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    import numpy as np


def check_seed(seed: int) -> int:
    """`seed`. Raises T5Error unless it is a whole number from 0 to 2⁶³ - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise T5Error(f"seed is {seed!r}; expected a whole number, 0 or more and less than 2**63")
    return seed


def derived_seed(*key: int) -> int:
    """A 64-bit seed that follows from these numbers (a seed, what it is for, epoch, batch …) and from no others."""
    import numpy as np  # here: commands that only read prompts or settings start without it

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def numpy_generator(*key: int) -> "np.random.Generator":
    """A generator of its own for these numbers (`derived_seed`)."""
    import numpy as np

    return np.random.default_rng(derived_seed(*key))
