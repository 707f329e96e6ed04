"""A sequence split over processes or chunks gives what the whole gives: the halves of `ttt` and one sum between."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from t5kernels import ttt, ttt_accumulate, ttt_apply
from torch.distributed.nn.functional import all_reduce

KIND = {"inner": "swiglu", "loss": "dot"}
B, H, N, D = 2, 3, 41, 8
SPLIT = [17, 24]  # uneven on purpose


def draw(tokens=N, width=D, **place):
    generator = torch.Generator(place.get("device", "cpu")).manual_seed(0)
    q, k, v, d_out = (torch.randn(B, H, tokens, width, generator=generator, **place) for _ in range(4))
    weights = [torch.randn(H, width, width, generator=generator, **place) * width**-0.5 for _ in range(3)]
    return q, k, v, weights, d_out


def whole(q, k, v, weights, d_out):
    """The output, and the gradients of q, k, v and the weights."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *weights)]
    out = ttt(*leaves[:3], tuple(leaves[3:]), scale=D**-0.5 / N, **KIND)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def one_process(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(SPLIT))
    q, k, v, weights, d_out = draw(dtype=torch.float64)
    q, k, v, d_out = (t.split(SPLIT, dim=2)[rank] for t in (q, k, v, d_out))
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *weights)]
    step = all_reduce(ttt_accumulate(*leaves[1:3], tuple(leaves[3:]), scale=D**-0.5 / N, **KIND))
    out = ttt_apply(leaves[0], tuple(leaves[3:]), step, inner=KIND["inner"])
    gradients = torch.autograd.grad(out, leaves, d_out)
    for gradient in gradients[3:]:
        dist.all_reduce(gradient)
    torch.save([out.detach(), *gradients], f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_a_part_of_the_tokens_each_give_the_whole(tmp_path):
    processes.spawn(one_process, (tmp_path / "rendezvous", tmp_path), nprocs=len(SPLIT))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SPLIT))]
    expected = whole(*draw(dtype=torch.float64))
    for index, result in enumerate(expected):
        if index < 4:  # of tokens, which lie beside each other
            torch.testing.assert_close(torch.cat([part[index] for part in parts], dim=2), result)
        else:
            for part in parts:
                torch.testing.assert_close(part[index], result)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_chunks_save_memory_on_one_card(impl):
    q, k, v, weights, _ = draw(1 << 17, 64, device="cuda", dtype=torch.bfloat16)
    scale = 64**-0.5 / q.shape[2]

    def chunked(count):
        parts = zip(k.chunk(count, dim=2), v.chunk(count, dim=2), strict=True)
        step = sum(ttt_accumulate(*part, weights, scale=scale, impl=impl, **KIND) for part in parts)
        out = torch.empty_like(q)
        for place, part in zip(out.chunk(count, dim=2), q.chunk(count, dim=2), strict=True):
            place.copy_(ttt_apply(part, weights, step, inner=KIND["inner"], impl=impl))
        return out

    def peak(count):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = chunked(count)
        return out, torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()

    (together, most), (apart, less) = peak(1), peak(16)
    torch.testing.assert_close(apart, together, rtol=2e-2, atol=2e-2)
    assert less < most / 2
