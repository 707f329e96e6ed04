"""The kernels as tests run them: compiled on a CUDA device, and by Triton's interpreter on a machine without one.

conftest.py imports this module before any test module, because a kernel is interpreted or not from its definition on.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from triton.language import core, semantic
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


def broadcast_unless_alike(semantic, left, right):
    """The language's `broadcast_impl_value`, which goes through the sides of two blocks also where they are equal."""
    blocks = left.type.is_block(), right.type.is_block()
    if blocks == (False, False) or (all(blocks) and left.type.shape.values == right.type.shape.values):
        return left, right
    return ORIGINAL_BROADCAST(semantic, left, right)


def numpy_dtype(dtype):
    """The interpreter's `_get_np_dtype`, which makes a table of all types for each look at it."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_dtype_of_numbers(dtype.scalar)


def block_type_once(self, element_ty, shape):
    """The language's `block_type.__init__`, which checks and writes out the same few shapes again and again."""
    sides = (side.value if isinstance(side, core.constexpr) else side for side in shape)
    key = element_ty.name, getattr(element_ty, "address_space", None), *sides
    if key not in BLOCK_TYPES:
        ORIGINAL_BLOCK_TYPE(self, element_ty, shape)
        BLOCK_TYPES[key] = vars(self)
    self.__dict__ = BLOCK_TYPES[key]


BLOCK_TYPES = {}
ORIGINAL_BLOCK_TYPE = core.block_type.__init__
ORIGINAL_BROADCAST = semantic.TritonSemantic.broadcast_impl_value
numpy_dtype_of_numbers = functools.cache(interpreter._get_np_dtype)
ORIGINAL_REDUCE = interpreter.ReduceOps.generic_reduce
if not CUDA:
    interpreter.ReduceOps.generic_reduce = reduce_by_slices
    interpreter._get_np_dtype = numpy_dtype
    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_alike
    core.block_type.__init__ = block_type_once
    interpreter.InterpretedFunction.__call__ = call_device_function
    # Compiled kernels do not watch for overflow of integers either; it costs the interpreter a quarter of its time.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "0" if CUDA else "1")
    import t5kernels.neighborhood.triton
    import t5kernels.ttt_layer.triton  # noqa: F401  (the two import every module with kernels)
