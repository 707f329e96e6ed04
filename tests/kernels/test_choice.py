"""Every op takes `impl` alike: a name of one of its implementations, or None for the fastest one that can do it."""

import pytest
import torch
from fake_card import fake_card
from t5kernels import (
    Settings,
    circular_attention,
    linear_attention,
    neighborhood_attention,
    ttt,
    ttt_accumulate,
    ttt_apply,
    ttt_layer,
)
from t5kernels.choice import Candidate, choose

FAST = ["ttt_accumulate", "ttt_apply"]


def candidate(name, by_default=True, obstacle=None):
    return Candidate(name, by_default, lambda: obstacle)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([], "reference"),
        ([candidate("fast")], "fast"),
        ([candidate("fast"), candidate("slow")], "fast"),
        ([candidate("fast", by_default=False), candidate("slow")], "slow"),
        ([candidate("fast", obstacle="here"), candidate("slow")], "slow"),
        ([candidate("fast", by_default=False)], "reference"),
        ([candidate("fast", obstacle="here")], "reference"),
    ],
)
def test_none_is_the_first_that_can_and_is_made_for_it(candidates, chosen):
    assert choose("op", None, *candidates) == chosen
    assert choose("op", "reference", *candidates) == "reference"


def test_what_is_asked_for_runs_or_is_an_error():
    assert choose("op", "slow", candidate("fast"), candidate("slow", by_default=False)) == "slow"
    with pytest.raises(ValueError, match=r"^op: impl='fast' cannot be used on Sundays$"):
        choose("op", "fast", candidate("fast", obstacle="on Sundays"))
    with pytest.raises(ValueError, match=r"op: impl is 'best'; expected one of \('fast', 'reference'\), or None"):
        choose("op", "best", candidate("fast"))


def test_obstacles_are_looked_for_only_where_the_answer_matters():
    def unexpected():
        raise AssertionError

    assert choose("op", None, Candidate("fast", False, unexpected)) == "reference"
    assert choose("op", "reference", Candidate("fast", True, unexpected)) == "reference"


def ops(impl):
    """Every op of the package with this `impl`, on few tokens on a CPU."""
    generator = torch.Generator().manual_seed(0)
    x, step = (torch.rand(1, 2, *size, generator=generator) for size in ((12, 8), (3, 8, 8)))
    weights, kind = (step[0, :, 0],) * 3, {"inner": "swiglu", "impl": impl}
    grid = {"rows": 3, "columns": 4, "impl": impl}
    return {
        "ttt": lambda: ttt(x, x, x, weights, scale=0.1, **kind),
        "ttt_accumulate": lambda: ttt_accumulate(x, x, weights, scale=0.1, **kind),
        "ttt_apply": lambda: ttt_apply(x, weights, step, **kind),
        "ttt_layer": lambda: ttt_layer((x, x, x), weights, Settings(), impl=impl)[0],
        "linear_attention": lambda: linear_attention(x, x, x, impl=impl),
        "neighborhood_attention": lambda: neighborhood_attention(x, x, x, window=3, **grid),
        "circular_attention": lambda: circular_attention(x, x, x, num_prefix_tokens=0, radius=2, **grid),
    }


@pytest.mark.parametrize("name", ops(None))
def test_on_a_cpu_none_is_the_reference_and_other_names_are_refused(name):
    assert torch.equal(ops(None)[name](), ops("reference")[name]())
    with pytest.raises(ValueError, match=f"^{name}: impl is 'fastest'; expected one of .*'reference'"):
        ops("fastest")[name]()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, FAST),
        ({"dtype": torch.float16}, FAST),
        ({"dtype": torch.float32}, []),
        ({"dtype": torch.float32, "impl": "triton"}, FAST),
        ({"impl": "reference"}, []),
        ({"device": "cpu"}, []),
        ({"images": 0}, []),
        ({"width": 160}, []),
        ({"major": 7}, []),
        ({"inner": "three_layer"}, []),
    ],
    ids=lambda value: "-".join(value) or "usual",
)
def test_16_bit_tokens_on_a_card_take_the_kernels_of_ttt_and_of_its_halves(change, expected):
    impl, inner, dtype = change.get("impl"), change.get("inner", "swiglu"), change.get("dtype", torch.bfloat16)
    width, device = change.get("width", 64), change.get("device", "cuda")
    with fake_card(change.get("major", 9)) as called:
        x = torch.empty(change.get("images", 1), 2, 5, width, dtype=dtype, device=device)
        weights = (torch.empty(2, width, width, dtype=dtype, device=device),) * 3
        assert ttt(x, x, x, weights, inner=inner, scale=0.1, impl=impl).dtype == dtype
        assert called == expected
        called.clear()
        step = ttt_accumulate(x, x, weights, inner=inner, scale=0.1, impl=impl)
        assert ttt_apply(x, weights, step, inner=inner, impl=impl).shape == x.shape
        assert called == expected
