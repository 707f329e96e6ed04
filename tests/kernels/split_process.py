"""One of two processes that hold a part of a sequence each. It imports little, because a new process does so anew."""

from datetime import timedelta

import torch
import torch.distributed as dist
from t5kernels import ttt_accumulate, ttt_apply
from torch.distributed.nn.functional import all_reduce

KIND = {"inner": "swiglu", "loss": "dot"}
B, H, N, D = 2, 3, 41, 8
SCALE = D**-0.5 / N
SPLIT = [17, 24]  # uneven on purpose


def draw(tokens=N, width=D, **place):
    """q, k, v, the inner weights, and the gradient of the output."""
    generator = torch.Generator(place.get("device", "cpu")).manual_seed(0)
    q, k, v, d_out = (torch.randn(B, H, tokens, width, generator=generator, **place) for _ in range(4))
    weights = [torch.randn(H, width, width, generator=generator, **place) * width**-0.5 for _ in range(3)]
    return q, k, v, weights, d_out


def one_process(rank, rendezvous, results):
    """Save the output and the gradients of q, k, v of this process's tokens, and the weights' gradients, summed."""
    timeout = timedelta(seconds=120)  # for the other process to come up
    dist.init_process_group("gloo", f"file://{rendezvous}", timeout, rank=rank, world_size=len(SPLIT))
    q, k, v, weights, d_out = draw(dtype=torch.float64)
    q, k, v, d_out = (t.split(SPLIT, dim=2)[rank] for t in (q, k, v, d_out))
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *weights)]
    step = all_reduce(ttt_accumulate(*leaves[1:3], tuple(leaves[3:]), scale=SCALE, **KIND))
    out = ttt_apply(leaves[0], tuple(leaves[3:]), step, inner=KIND["inner"])
    gradients = torch.autograd.grad(out, leaves, d_out)
    for gradient in gradients[3:]:
        dist.all_reduce(gradient)
    torch.save([out.detach(), *gradients], f"{results}/{rank}.pt")
    dist.destroy_process_group()
