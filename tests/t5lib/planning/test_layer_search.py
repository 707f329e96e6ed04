"""Layer choice: hybrids hold exactly the layers they name and survive saving, the scan measures what it says, the
solver is exact, and rules are compared at equal cost."""

import itertools
import json
import random

import pytest
import torch
from tiny import random_images, tiny_vit
from torch.nn import functional as F

from t5lib.checkpoint import load, save
from t5lib.conversion import convert, ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.layers.layer_map import parse_indices, parse_layers
from t5lib.planning import layer_search
from t5lib.utils.errors import T5Error

DEPTH, KINDS = 3, ("swiglu", "two_layer")


@pytest.fixture(scope="module")
def softmax():
    return tiny_vit("augreg", depth=DEPTH)


@pytest.fixture(scope="module")
def calibrated(softmax):
    """A model of each kind whose every weight, projections included, differs from the softmax model's."""
    models = {kind: convert(softmax, TTTConfig().named(kind)) for kind in KINDS}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for model in models.values():
            for layer in ttt_layers(model).values():
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    return models


@pytest.fixture(scope="module")
def batches():
    labels = torch.arange(6) % 7
    return [(random_images(4), labels[:4]), (random_images(2, seed=1), labels[4:])]


class TestHybrid:
    def test_holds_the_layers_that_it_names_and_copies_them(self, softmax, calibrated):
        model = layer_search.hybrid(softmax, calibrated, ["swiglu", "softmax", "two_layer"])
        for layer, source in ((0, calibrated["swiglu"]), (1, softmax), (2, calibrated["two_layer"])):
            ours, theirs = (m.blocks[layer].attn.state_dict() for m in (model, source))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert ours["qkv.weight"].data_ptr() != theirs["qkv.weight"].data_ptr()
        assert model.t5_config.layers == {"0": "swiglu", "1": "softmax", "2": "two_layer"}
        assert model.t5_report.layers == ("blocks.0.attn", "blocks.2.attn")

    def test_is_the_same_after_saving_and_loading(self, softmax, calibrated, tmp_path):
        model = layer_search.hybrid(softmax, calibrated, ["softmax", "two_layer", "two_layer"])
        save(model, tmp_path / "hybrid")
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "hybrid")(random_images()), model(random_images()))

    def test_of_softmax_in_every_layer_is_the_softmax_model(self, softmax, calibrated):
        model = layer_search.hybrid(softmax, calibrated, ["softmax"] * DEPTH)
        assert not hasattr(model, "t5_config")
        with torch.no_grad():
            assert torch.equal(model(random_images()), softmax(random_images()))

    def test_a_neighborhood_kind_does_not_leak_into_its_neighbours(self, softmax):
        kinds = {kind: convert(softmax, TTTConfig().named(kind)) for kind in ("swiglu", "swiglu+nat3")}
        model = layer_search.hybrid(softmax, kinds, ["swiglu+nat3", "swiglu", "softmax"])
        assert [layer.mixer.config.window for layer in ttt_layers(model).values()] == [3, None]

    def test_settings_that_the_map_cannot_tell_are_refused(self, softmax, calibrated):
        other = {**calibrated, "swiglu": convert(softmax, TTTConfig(key_norm="rms"))}
        with pytest.raises(T5Error, match=r"'swiglu' has key_norm 'rms'.* stands for 'instance'"):
            layer_search.hybrid(softmax, other, ["two_layer", "swiglu", "softmax"])

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [(["swiglu"], "names 1 layers; this model has 3"), (["swiglu", "performer", "softmax"], "layer 'performer'")],
    )
    def test_assignments_that_do_not_fit_are_refused(self, softmax, calibrated, assignment, message):
        with pytest.raises(T5Error, match=message):
            layer_search.hybrid(softmax, calibrated, assignment)


class TestScan:
    def test_with_labels_it_is_the_increase_of_cross_entropy_of_the_hybrid(self, softmax, calibrated, batches):
        found = layer_search.scan(softmax, calibrated, batches)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        alone = layer_search.hybrid(softmax, calibrated, ["softmax", "two_layer", "softmax"])
        with torch.no_grad():
            before, after = (F.cross_entropy(m(images), labels, reduction="none") for m in (softmax, alone))
        assert found["loss"] == "cross-entropy" and found["images"] == 6
        assert found["softmax_loss"] == pytest.approx(before.mean().item(), rel=1e-5)
        rise = (after - before).double()
        assert found["increase"][1]["two_layer"] == pytest.approx(rise.mean().item(), rel=1e-3)
        expected = rise.std(correction=0).item() / 6**0.5
        assert found["standard_error"][1]["two_layer"] == pytest.approx(expected, rel=1e-3)
        assert [list(row) for row in found["increase"]] == [list(KINDS)] * DEPTH
        json.dumps(found)

    def test_without_labels_it_is_the_divergence_from_the_softmax_model(self, softmax, calibrated, batches):
        images = batches[0][0]
        found = layer_search.scan(softmax, calibrated, [images])
        alone = layer_search.hybrid(softmax, calibrated, ["swiglu", "softmax", "softmax"])
        with torch.no_grad():
            p, q = (m(images).log_softmax(-1) for m in (softmax, alone))
        assert found["loss"] == "kl" and found["softmax_loss"] == 0
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        assert found["increase"][0]["swiglu"] == pytest.approx(kl, rel=1e-3)
        assert kl > 0

    def test_labels_with_some_batches_alone_are_refused(self, softmax, calibrated, batches):
        with pytest.raises(T5Error, match="some batches have labels and others have none"):
            layer_search.scan(softmax, calibrated, [batches[0], batches[1][0]])

    def test_without_head_it_is_one_minus_the_cosine_of_the_features(self, batches):
        headless = tiny_vit("augreg", num_classes=0)
        found = layer_search.scan(headless, {"swiglu": convert(headless)}, batches)
        alone = layer_search.hybrid(headless, {"swiglu": convert(headless)}, ["swiglu", "softmax"])
        images = torch.cat([batch[0] for batch in batches])
        with torch.no_grad():
            cosine = F.cosine_similarity(alone(images), headless(images)).mean().item()
        assert found["loss"] == "cosine"
        assert found["increase"][0]["swiglu"] == pytest.approx(1 - cosine, rel=1e-3)

    def test_leaves_the_models_as_they_were(self, softmax, calibrated, batches):
        modules = [module for model in (softmax, *calibrated.values()) for module in model.modules()]
        layer_search.scan(softmax, calibrated, batches)
        assert modules == [module for model in (softmax, *calibrated.values()) for module in model.modules()]

    def test_no_images_is_an_error(self, softmax, calibrated):
        with pytest.raises(T5Error, match="no image"):
            layer_search.scan(softmax, calibrated, [])


def instance(layers: int, kinds: int, seed: int):
    rng = random.Random(seed)
    names = [f"k{index}" for index in range(kinds)]
    increase = [{name: rng.uniform(-0.05, 1) for name in names} for _ in range(layers)]
    cost = [{"softmax": 3.0} | {name: rng.uniform(1, 3.5) for name in names} for _ in range(layers)]
    return increase, cost, rng.uniform(1.6, 3.1) * layers


class TestSolver:
    @pytest.mark.parametrize("seed", range(6))
    def test_finds_the_best_ones_in_order_as_trying_all_does(self, seed):
        increase, cost, budget = instance(5, 2, seed)
        value = lambda a: sum({"softmax": 0.0, **row}[kind] for row, kind in zip(increase, a, strict=True))  # noqa: E731
        every = [list(a) for a in itertools.product(cost[0], repeat=5) if layer_search.total(cost, a) <= budget]
        if not every:
            with pytest.raises(T5Error, match="out of reach"):
                layer_search.choose(increase, cost, budget)
            return
        best = sorted(every, key=value)[:4]
        found = layer_search.shortlist(increase, cost, budget, 4)
        assert [value(a) for a in found] == pytest.approx([value(a) for a in best], abs=1e-6)
        assert layer_search.choose(increase, cost, budget) == best[0]

    def test_small_increases_are_told_apart(self):
        increase = [{"k": 3e-6}, {"k": 1e-6}, {"k": 2e-6}]
        cost = [{"softmax": 2.0, "k": 1.0}] * 3
        assert layer_search.choose(increase, cost, 5.0) == ["softmax", "k", "softmax"]

    def test_a_budget_that_cannot_be_met_says_what_can(self):
        with pytest.raises(T5Error, match=r"budget of 2 .*cheapest assignment costs 2\.4"):
            layer_search.choose([{"k": 0.1}] * 3, [{"softmax": 1.0, "k": 0.8}] * 3, 2.0)

    def test_gives_fewer_when_there_are_no_more(self):
        assert len(layer_search.shortlist([{"k": 0.1}] * 2, [{"softmax": 1.0, "k": 0.8}] * 2, 2.0, 9)) == 4


def marks(assignment) -> str:
    return "".join("s" if kind == "softmax" else "k" for kind in assignment)


class TestRules:
    def test_first_last_and_evenly_spaced(self):
        assert {name: marks(a) for name, a in layer_search.fixed_rules(6, 3, "k").items()} == {
            "first": "kkksss",
            "last": "ssskkk",
            "evenly spaced": "sksksk",
        }
        assert all(
            marks(a).count("k") == count
            for count in range(13)
            for a in layer_search.fixed_rules(12, count, "k").values()
        )

    def test_within_a_budget_they_convert_no_more_than_they_must(self):
        cost = [{"softmax": 3.0, "a": 1.0, "b": 2.5}] * 4
        found = {name: marks(a) for name, a in layer_search.rules_within(cost, 10.0).items()}
        assert found == {"first 1 a": "ksss", "last 1 a": "sssk", "evenly spaced 1 a": "ssks", "all b": "kkkk"}
        assert "b" not in " ".join(layer_search.rules_within(cost, 9.0))

    def test_are_compared_with_the_chosen_one_on_the_same_images(self, softmax, calibrated, batches):
        cost = [{"softmax": 3.0, "swiglu": 1.0, "two_layer": 2.0}] * DEPTH
        chosen = {"solver": ["softmax", "swiglu", "softmax"]}
        (rows,) = layer_search.compare_rules(softmax, calibrated, cost, [7.0], [chosen], batches)
        assert [row["name"] for row in rows][:2] == ["solver", "first 1 swiglu"]
        assert {row["name"] for row in rows} >= {"last 2 two_layer", "evenly spaced 1 swiglu"}
        assert all(row["cost"] <= 7 for row in rows)
        assert rows[0]["behind"] == 0
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        for row in rows:
            model = layer_search.hybrid(softmax, calibrated, list(named_in(row["layers"])))
            with torch.no_grad():
                logits = model(images)
            assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
            assert row["top1"] == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean().item(), abs=1e-3)
            assert row["behind"] == pytest.approx(row["loss"] - rows[0]["loss"])
        json.dumps(rows)

    def test_selection_by_measurement_is_no_worse_than_any_rule_on_its_own_images(self, softmax, calibrated, batches):
        cost = [{"softmax": 3.0, "swiglu": 1.0, "two_layer": 2.0}] * DEPTH
        increase = layer_search.scan(softmax, calibrated, batches)["increase"]
        (picked,) = layer_search.select(softmax, calibrated, increase, cost, [7.0], batches, count=3)
        (rows,) = layer_search.compare_rules(softmax, calibrated, cost, [7.0], [{"picked": picked}], batches)
        assert min(row["behind"] for row in rows) >= 0


def named_in(layers: dict[str, str]):
    for numbers, kind in layers.items():
        yield from [kind] * len(parse_indices(numbers))


def test_the_text_of_a_map_is_what_convert_takes():
    text = layer_search.layer_text(["softmax", "softmax", "swiglu+nat5"])
    assert text == "0-1=softmax,2=swiglu+nat5"
    assert parse_layers(text) == {"0-1": "softmax", "2": "swiglu+nat5"}


def test_a_mixture_can_be_told_whichever_kind_comes_first():
    kinds = ("hedgehog", "swiglu", "dit5")
    softmax = tiny_vit("augreg", depth=DEPTH, img_size=48)  # dit5 looks at 5 x 5 patches
    models = {kind: convert(softmax, TTTConfig().named(kind)) for kind in kinds}
    for assignment in (kinds, kinds[::-1]):
        mixed = layer_search.hybrid(softmax, models, list(assignment))
        inners = [layer.mixer.config.inner for layer in ttt_layers(mixed).values()]
        assert inners == [TTTConfig().named(kind).inner for kind in assignment]
