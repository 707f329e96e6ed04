"""What torch.compile captures is checked, and nothing is generated: that is what takes its time on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn


@contextmanager
def compiled_for_tracing_alone() -> Iterator[None]:
    """Within, `module.compile()` uses the backend "eager"."""
    compile_module = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, **how | {"backend": "eager"}))
        yield
