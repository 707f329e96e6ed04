"""Custom ops that cost little in every call, and their gradients.

`torch.library.custom_op` compares the storage of all arguments and results in every call. The autograd that it
registers fills in default values by a loop that is quadratic in the number of arguments: 0.3 ms a call with two dozen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("t5kernels", "FRAGMENT")


def op(name: str) -> Callable[[Callable], Callable]:
    """Make a function the op `t5kernels::<name>`, which torch.compile and torch.export do not look into.

    Its annotations are its schema. It changes no argument, and none of its results shares memory with another tensor.
    `torch.library.register_fake` tells the results' shapes. It has no gradients by itself: see `differentiable`.
    """

    def define(run: Callable) -> Callable:
        LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        return getattr(torch.ops.t5kernels, name).default

    return define


def differentiable(run: Callable, keep: Callable, differentiate: Callable) -> Callable:
    """An op with gradients. Where none is wanted, it costs no more than the op.

    Args:
        keep: (ctx, inputs, outputs) keeps what the backward needs, as `setup_context` of an autograd function does.
        differentiate: (ctx, *gradients of outputs) returns those of the inputs. The gradient of an output that had no
            part in the loss is None.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = run(*inputs)
            ctx.set_materialize_grads(False)  # or outputs that are only kept would be given zeros
            keep(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return differentiate(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return Differentiable.apply(*inputs) if wanted else run(*inputs)

    return call
