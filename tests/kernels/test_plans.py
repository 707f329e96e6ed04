"""A planned call does what the call itself does, wherever its tensors lie, and shares memory where it may."""

from dataclasses import replace

import pytest
import torch
from layer_cases import BARE as NO_KEY_NORM
from layer_cases import LEAST, Case, call, draw, results
from t5kernels import Settings, launch, plans
from t5kernels.launch import Launch
from torch import Tensor

# Everything at once, in as few programs as may be: what is planned does not depend on how many there are.
ALL = replace(LEAST, prefix=1, after=1)
LAST = replace(LEAST, images=2, settings=Settings(inner="swiglu_last"))
LINEAR = replace(ALL, settings=Settings(inner="linear_proj_qk"))
MODALITY = replace(ALL, settings=Settings(norm_scope="modality"))
BARE = Case(rows=2, columns=2, text=2, width=8, conv=False, settings=NO_KEY_NORM)


@pytest.fixture(autouse=True)
def none_known(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})


def outputs(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return call(case, leaves, "triton")


@pytest.mark.parametrize("case", [ALL, LAST, LINEAR, Case(heads=1, rows=2, columns=2, width=8, conv=False)], ids=str)
def test_a_planned_layer_gives_the_same_bits_for_other_tokens_and_weights(case):
    dtype = torch.float16
    outputs(case, draw(case, dtype, seed=1).leaves)
    assert all(plan is not None for plan in plans._plans.values())
    leaves = draw(case, dtype, seed=2).leaves
    replayed, again = outputs(case, leaves), outputs(case, leaves)
    assert len(plans._plans) == 1
    plans._plans.clear()
    expected = outputs(case, leaves)
    for out, same, plain in zip(replayed, again, expected, strict=True):
        assert torch.equal(out, plain) and torch.equal(same, plain) and out.stride() == plain.stride()


@pytest.mark.parametrize("case", [ALL, MODALITY, LAST, LINEAR, BARE], ids=str)
def test_a_planned_backward_gives_the_same_bits(case):
    dtype = torch.float16
    results(case, draw(case, dtype, seed=1), "triton")
    assert len(plans._plans) == 2 and None not in plans._plans.values()
    planned = results(case, draw(case, dtype, seed=2), "triton")
    assert len(plans._plans) == 2
    plans._plans.clear()
    expected = results(case, draw(case, dtype, seed=2), "triton")
    assert expected.keys() == planned.keys() and all(torch.equal(planned[name], expected[name]) for name in expected)


def test_a_text_takes_no_launches_of_its_own_and_all_parameters_share_an_output():
    def launches(case: Case) -> list[int]:
        plans._plans.clear()
        results(case, draw(case), "triton")
        return [len(plan.steps) for plan in plans._plans.values() if plan is not None]

    alone, with_text = launches(replace(LEAST, text=0)), launches(LEAST)
    assert with_text == [count + 1 for count in alone], "image and text each have a step and its gradient, to be added"
    *_, backward = plans._plans.values()
    assert backward is not None and len(backward.outputs) == 6 + 1
    assert launches(replace(LEAST, settings=Settings(norm_scope="modality")))[1] == with_text[1]


def test_a_layout_has_its_own_plan():
    leaves = draw(LEAST).leaves
    for change in ({}, {"q": leaves["q"].contiguous()}, {"w1": leaves["w1"].half()}):
        before = len(plans._plans)
        outputs(LEAST, leaves | change)
        assert len(plans._plans) == before + 1


def test_tensors_that_may_or_may_not_be_one_are_never_planned():
    leaves = draw(LEAST).leaves
    shared = outputs(LEAST, leaves | {"k": leaves["q"]})
    assert list(plans._plans.values()) == [None]
    apart = outputs(LEAST, leaves | {"k": leaves["q"].clone(memory_format=torch.preserve_format)})
    assert torch.equal(shared[0], apart[0])


def test_a_call_that_computes_by_pytorch_is_never_planned():
    def run(x: Tensor) -> tuple[Tensor]:
        return (x + 1,)

    for number in (1.0, 2.0):
        (out,) = plans.planned(run, (torch.full((3,), number),))
        assert out.tolist() == [number + 1] * 3
    assert list(plans._plans.values()) == [None]


def test_a_workspace_holds_together_only_what_is_needed_together():
    a, b, c, d = (torch.empty(count, dtype=torch.uint8) for count in (1000, 500, 1000, 200))
    known = torch.empty(10)
    launches = [Launch(print, (known, a)), Launch(print, (a, b)), Launch(print, (b, 3, c)), Launch(print, (c, d[50:]))]
    spots, size = plans._share_memory(launches, {}, {known.data_ptr()}, workspace=7)
    assert all(spot.base == 7 for spot in spots.values())
    places = [(spots[t.untyped_storage().data_ptr()].offset, t.numel()) for t in (a, b, c, d)]
    assert all(start % plans.LINE == 0 and start + count <= size for start, count in places)
    for first, second in ((0, 1), (1, 2), (2, 3)):  # used by the same launch
        (start, count), (other, its) = places[first], places[second]
        assert start + count <= other or other + its <= start
    assert size == 1024 + 512 and places[2][0] == places[0][0]


def test_an_output_lends_its_memory_until_it_is_written():
    a, b, out = (torch.empty(count, dtype=torch.uint8) for count in (1000, 2000, 1200))
    launches = [Launch(print, (a,)), Launch(print, (a, b)), Launch(print, (b, out))]
    spots, size = plans._share_memory(launches, {3: out}, set(), workspace=7)
    assert spots == {a.data_ptr(): (3, 0), b.data_ptr(): (7, 0)} and size == 2048
    small = torch.empty(1000, dtype=torch.uint8)  # whole lines of it hold 768
    spots, _ = plans._share_memory([Launch(print, (a,)), Launch(print, (small,))], {3: small}, set(), workspace=7)
    assert spots == {a.data_ptr(): (7, 0)}
    spots, _ = plans._share_memory([Launch(print, (a,)), Launch(print, (a, out))], {3: out}, set(), workspace=7)
    assert spots == {a.data_ptr(): (7, 0)}, "they are needed together"


def test_sizes_that_never_repeat_take_no_more_and_more_memory(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 5)
    for number in range(20):
        plans.planned(lambda x, number: (x.new_empty(number),), (torch.zeros(2),), number + 1)
    assert len(plans._plans) <= 5


def test_on_a_card_the_driver_gets_the_addresses_of_every_call(monkeypatch):
    monkeypatch.setattr(launch, "stream_of", lambda x: 7)
    seen = []
    x = torch.zeros(100)
    places = [plans.Place(0, 0, 0, x.dtype), plans.Place(2, 1, 40, x.dtype)]
    specs = [((5, 4), (4, 1), torch.float32)]
    plan = plans.Plan([plans.Step(print, [None, 3, None, None], places)], specs, 300, lambda *told: seen.append(told))
    for inputs in ((x,), (x[10:],)):
        (out,) = plan(inputs, [inputs[0].data_ptr()])
        assert out.shape == (5, 4)
        addresses, stream = seen.pop()
        assert addresses.tolist() == [inputs[0].data_ptr(), out.data_ptr() + 40] and stream == 7
