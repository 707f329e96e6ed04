"""A sequence split over processes or chunks gives what the whole gives, by the halves of `ttt` and one sum between."""

import pytest
import torch
import torch.multiprocessing as processes
from exactness import relative_error
from split_process import KIND, SCALE, SPLIT, draw, one_process
from t5kernels import ttt, ttt_accumulate, ttt_apply
from torch.testing import assert_close
from triton_device import needs_cuda


def whole(q, k, v, weights, d_out):
    """The output, and the gradients of q, k, v and the weights."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *weights)]
    out = ttt(*leaves[:3], tuple(leaves[3:]), scale=SCALE, **KIND)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


@pytest.mark.slow
def test_two_processes_with_a_part_of_the_tokens_each_give_the_whole(tmp_path):
    other = processes.get_context("spawn").Process(target=one_process, args=(1, tmp_path / "rendezvous", tmp_path))
    other.start()
    one_process(0, tmp_path / "rendezvous", tmp_path)
    other.join()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SPLIT))]
    expected = whole(*draw(dtype=torch.float64))
    for index, result in enumerate(expected):
        if index < 4:  # of tokens, which lie beside each other
            assert_close(torch.cat([part[index] for part in parts], dim=2), result)
        else:
            for part in parts:
                assert_close(part[index], result)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_chunks_save_memory_on_one_card(impl):
    q, k, v, weights, _ = draw(1 << 17, 64, device="cuda", dtype=torch.bfloat16)
    scale = 64**-0.5 / q.shape[2]

    def in_chunks(count):
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
        out = in_chunks(count)
        return out, torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()

    (together, most), (apart, less) = peak(1), peak(16)
    # Of 50 million numbers in bfloat16 one or two lie far apart by rounding.
    assert relative_error(apart, together.double()) < 1e-2
    assert less < most / 2
