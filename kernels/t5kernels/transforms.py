"""Transforms of torch.func: what the kernels cannot take part in."""

import torch


def transformed() -> bool:
    """Whether a transform of torch.func is at work.

    A custom op without rules for it fails under `grad` and, worse, has no tangents under `jvp`, without a word.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
