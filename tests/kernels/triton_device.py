"""The kernels as tests run them: compiled on a CUDA device, and by Triton's interpreter on a machine without one.

conftest.py imports this module before any test module, because a kernel is interpreted or not from its definition on.
"""

import dataclasses

import numpy as np
import pytest
import torch
from triton.runtime import interpreter  # before TRITON_INTERPRET is set: Triton's own functions are not made for it

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter is wrong in bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def reduce_by_slices(reduction, tensors):
    """The interpreter's `ReduceOps.generic_reduce` for sums and maxima, which takes whole slices at a time.

    The order is the interpreter's, so results have the same bits (test_triton_device.py). Its own loop over single
    numbers takes most of the time of every kernel that sums.
    """
    combine = {"_add": np.add, "_larger": np.maximum}.get(reduction.combine_fn.fn.__name__)
    if combine is None:
        return ORIGINAL_REDUCE(reduction, tensors)
    (tensor,) = tensors
    total, *others = np.moveaxis(tensor.handle.data, reduction.axis, 0)
    for other in others:
        total = combine(total, other)
    return [reduction.to_tensor(total, tensor.dtype)]


def call_device_function(function, *args, **kwargs):
    """The interpreter's call of one kernel function by another, without patching the language once more for it."""
    return function.rewrite()(*args, **kwargs)


ORIGINAL_REDUCE = interpreter.ReduceOps.generic_reduce
if not CUDA:
    interpreter.ReduceOps.generic_reduce = reduce_by_slices
    interpreter.InterpretedFunction.__call__ = call_device_function
    # Compiled kernels do not watch for overflow of integers either; it costs the interpreter a quarter of its time.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "0" if CUDA else "1")
    import t5kernels.neighborhood.triton
    import t5kernels.ttt_layer.triton  # noqa: F401  (the two import every module with kernels)
