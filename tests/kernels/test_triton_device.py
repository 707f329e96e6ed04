"""What the tests change of Triton's interpreter makes it faster and nothing else."""

import numpy as np
import pytest
import triton.language as tl
from t5kernels import reductions
from triton.runtime import interpreter
from triton_device import (
    CUDA,
    ORIGINAL_BLOCK_TYPE,
    ORIGINAL_BROADCAST,
    ORIGINAL_REDUCE,
    block_type_once,
    broadcast_unless_alike,
    numpy_dtype,
    reduce_by_slices,
)

pytestmark = pytest.mark.skipif(CUDA, reason="about the interpreter")


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


@pytest.mark.parametrize("shapes", [([4, 8], [4, 8]), ([4, 8], [8]), ([4, 1], [4, 8]), ([4, 8], None), (None, None)])
def test_what_is_broadcast_is_what_the_language_broadcasts(shapes):
    def operand(shape):
        data = np.ones(shape or 1, np.float32)
        kind = tl.block_type(tl.float32, shape) if shape else tl.float32
        return tl.core.tensor(interpreter.TensorHandle(data, tl.float32), kind)

    pair = [operand(shape) for shape in shapes]
    ours, theirs = (
        how(interpreter.interpreter_semantic, *pair) for how in (broadcast_unless_alike, ORIGINAL_BROADCAST)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.type == other.type
        np.testing.assert_array_equal(one.handle.data, other.handle.data)


@pytest.mark.parametrize(
    "element", [tl.float16, tl.int1, tl.pointer_type(tl.float16), tl.pointer_type(tl.int8, "other")]
)
def test_types_of_blocks_and_of_their_numbers_are_the_languages_own(element):
    for _ in range(2):  # the second is known
        ours, theirs = (object.__new__(tl.block_type) for _ in range(2))
        block_type_once(ours, element, [4, tl.constexpr(8)])
        ORIGINAL_BLOCK_TYPE(theirs, element, [4, tl.constexpr(8)])
        assert ours == theirs and str(ours) == str(theirs) and ours.numel == theirs.numel == 32
        assert ours.element_ty == element
    assert numpy_dtype(element) == numpy_dtype(theirs)
    assert numpy_dtype(element) == {"fp16": np.float16, "int1": bool}.get(element.name, np.uint64)


def test_a_shape_that_no_block_may_have_is_refused_every_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
