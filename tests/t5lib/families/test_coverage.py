"""Whatever model there is, it converts or is refused by a T5Error; and the table of it says so."""

import json
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

from t5lib.families import coverage
from t5lib.families.coverage import ACCEPTED, NOT_MADE, ON_REQUEST, REFUSED, judged, page, timm_models, verdicts

SAMPLE = {
    "vit_tiny_patch16_224": ACCEPTED,
    "vit_small_patch16_dinov3": ACCEPTED,
    "vit_small_patch16_rope_mixed_224": ACCEPTED,
    "naflexvit_base_patch16_siglip": ACCEPTED,
    "qwen3_vit_88m_merge": ACCEPTED,
    "deepseek_vit_412m": ACCEPTED,
    "test_vit_relpos": ON_REQUEST,
    "beit_base_patch16_224": ON_REQUEST,
    "xcit_nano_12_p16_224": REFUSED,
    "swin_tiny_patch4_window7_224": REFUSED,
    "vit_small_patch16_18x2_224": REFUSED,
    "resnet10t": REFUSED,
}


@pytest.fixture(scope="module")
def sample():
    return [judged("timm", name, timm_models()[name]) for name in SAMPLE]


def test_models_are_accepted_on_request_or_refused_for_a_known_reason(sample):
    assert {each.name: each.result for each in sample} == SAMPLE
    refused = {each.name: coverage._short(each) for each in sample if each.result == REFUSED}
    assert all(reason in coverage.refusals.KNOWN for reason in refused.values()), refused
    assert [each.name for each in sample if not each.attends] == ["resnet10t"]


def test_the_page_counts_them_by_class_and_reason(sample):
    lines = page(sample).splitlines()
    assert "| timm | 12 | 11 | 6 | 2 | 4 | 0 |" in lines
    counted = {"| VisionTransformer | 1 | 0 | 1 |", "| Beit | 0 | 1 | 1 |", "| Eva | 2 | 0 | 2 |"}
    assert counted < {*lines}
    assert "| its attention is linear already | 1 | Xcit 1 |" in lines
    assert "| it has no attention | 1 | ResNet 1 |" in lines


def test_what_a_library_cannot_make_by_itself_is_counted_apart():
    def needs_more(argument):
        return argument

    found = judged("diffusers", "OmniGen", needs_more)
    assert (found.result, found.kind) == (NOT_MADE, "OmniGen") and "argument" in found.reason
    assert "| its library makes none by default | 1 | OmniGen 1 |" in page([found])


def test_a_mistake_of_ours_is_not_taken_for_a_refusal(monkeypatch):
    def mistaken(*_):
        raise AttributeError("ours")

    monkeypatch.setattr(coverage, "chosen_layers", mistaken)
    with pytest.raises(AttributeError, match="ours"):
        judged("timm", "vit", lambda: timm.create_model("vit_tiny_patch16_224"))


def test_a_converted_model_that_cannot_run_fails_the_run(monkeypatch):
    class Broken(torch.nn.Identity):
        def forward(self, x):
            return x[:, :-1]

    def broken():
        model = timm.create_model("vit_tiny_patch16_224")
        model.norm_pre = Broken()
        return model

    with pytest.raises(AssertionError, match="a converted VisionTransformer does not run"):
        judged("timm", "vit", broken)


@pytest.mark.slow
@pytest.mark.parametrize("library", coverage.CATALOGUES)
def test_no_architecture_raises_anything_else(library):
    """Of every fortieth; the command goes through all, and ends with the first error that is no T5Error."""
    names = sorted(coverage.CATALOGUES[library]())[::40]
    assert all(found.result for name in names for found in verdicts([library], name))


def test_the_published_table_is_of_these_libraries_and_has_no_fewer_models_than_promised():
    table = json.loads((Path(__file__).parents[3] / "docs/results/coverage.json").read_text())
    by_library = {library: {} for library in coverage.CATALOGUES}
    for model in table["models"]:
        by_library[model["library"]][model["name"]] = model["result"]
    if table["versions"]["timm"] == timm.__version__:
        own = {name for name in timm_models() if name.startswith("t5_")}  # of timm_registry, where a test imported it
        assert by_library["timm"].keys() == timm_models().keys() - own
    counts = Counter(by_library["timm"].values())
    assert counts[ACCEPTED] >= 270 and counts[ACCEPTED] + counts[ON_REQUEST] >= 300
