"""What the tests change of Triton's interpreter makes it faster and nothing else."""

import numpy as np
import pytest
import triton.language as tl
from t5kernels import reductions
from triton.runtime import interpreter
from triton_device import CUDA, ORIGINAL_REDUCE, reduce_by_slices


@pytest.mark.skipif(CUDA, reason="about the interpreter")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("combine", [reductions._add, reductions._larger], ids=["sum", "maximum"])
def test_reductions_by_slices_give_the_bits_that_the_interpreter_gives(combine, axis):
    data = np.random.default_rng(0).standard_normal((4, 8), np.float32)
    block = tl.core.tensor(interpreter.TensorHandle(data, tl.float32), tl.block_type(tl.float32, [4, 8]))
    reduction = interpreter.ReduceOps(axis, combine, keep_dims=False)
    scope = interpreter._patch_lang(combine.fn)
    try:
        (fast,), (slow,) = reduce_by_slices(reduction, (block,)), ORIGINAL_REDUCE(reduction, (block,))
    finally:
        scope.restore()
    assert fast.shape == slow.shape
    np.testing.assert_array_equal(fast.handle.data, slow.handle.data)
