"""The standard for kernels: at most twice the error of plain PyTorch in the same dtype, both against float64."""

import math

import torch

ALLOWED = 2
# Of a few numbers in float32 plain PyTorch is wrong by a few roundings, now and then by luck less.
LEAST = {torch.float32: 4 * torch.finfo(torch.float32).eps}


def relative_error(result, exact):
    """Root mean square over heads, each against its own size: no head hides behind a larger one. Absolute at 0."""
    dims = (-2, -1) if result.ndim > 2 else None
    size = exact.norm(dim=dims)
    per_head = (result.double() - exact).norm(dim=dims) / torch.where(size > 0, size, 1)
    return per_head.square().mean().sqrt().item()


def assert_as_exact_as_plain(kernel, plain, exact):
    """All three: tensors by name."""
    assert kernel.keys() == plain.keys() == exact.keys()
    for name in exact:
        largest = torch.finfo(plain[name].dtype).max
        assert exact[name].abs().max() < largest, f"{name}: the test's numbers are too large for {plain[name].dtype}"
        assert kernel[name].dtype == plain[name].dtype
        error, allowed = (relative_error(results[name], exact[name]) for results in (kernel, plain))
        # A gradient that is 0 by nature; and float16 on an H100, where cuBLAS now and then gave NaN for dv.
        if not exact[name].any() or not math.isfinite(allowed):
            allowed = torch.finfo(plain[name].dtype).eps
        allowed = max(allowed, LEAST.get(plain[name].dtype, 0))
        assert error <= ALLOWED * allowed, f"{name}: relative error {error:.2e}, plain PyTorch {allowed:.2e}"
