"""When one thing is as good as another: the bound of a mean over seeds, for differences taken seed by seed."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t


def upper_bound(values: Sequence[float]) -> float | None:
    """The upper one-sided bound of 95 % of the values' mean (Student's t); None for a single value."""
    count = len(values)
    if count < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(count)
    return statistics.mean(values) + float(student_t.ppf(0.95, count - 1)) * error
