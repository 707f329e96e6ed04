"""The table of shared passes compares every way with one card, and goes on where it stopped."""

import functools
from dataclasses import replace

import pytest

from t5lib.benchmarks import several_gpus
from t5lib.benchmarks.several_gpus import ONE, ways
from t5lib.benchmarks.shapes import SHAPES
from t5lib.benchmarks.timing import TimingConfig
from t5lib.benchmarks.training_step import SMALL
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

pytestmark = pytest.mark.xdist_group("processes")
SHAPE = replace(SHAPES["sd35-medium"], arguments=SMALL, text_tokens=3).shallower(2)
CONFIG = TimingConfig(batch=2, repeats=2, warmup=0)


def test_every_way_is_measured_once_and_checked(groups, tmp_path):
    out = tmp_path / "several.json"
    run = functools.partial(several_gpus.run, shape=SHAPE, layers="all", config=CONFIG)
    first, *others = groups[4](run, out, [64])
    assert isinstance(first, dict), first
    assert read_json(out) == first
    assert [row["way"] for row in first["rows"]] == [*ways(4, batch=2)]
    assert all(row["relative_error"] < 1e-4 and len(row["ms_runs"]) == 2 for row in first["rows"])
    assert all([row["ms_runs"] for row in each["rows"]] == [row["ms_runs"] for row in first["rows"]] for each in others)
    found = {row["way"]: row["collectives"] for row in first["rows"]}
    # Four attentions: statistics, neighbors and step of each; the whole at the end; and whether inputs are alike.
    assert found == {ONE: 0, "rows on 2": 14, "rows on 4": 14, "guidance on 2": 2, "guidance and rows on 4": 16}
    assert [row["communication_ms"] > 0 for row in first["rows"]] == [False, *[True] * 4]
    assert several_gpus.report(first).count("\n") == 6
    again = groups[4](run, out, [64])
    assert again[0] == first, "what is in the file is not measured again"


def test_ways_take_all_cards_that_there_are_and_guidance_two_latents():
    assert ways(1, batch=2) == {ONE: {}}
    assert ways(3, batch=2) == {ONE: {}, "rows on 3": {"rows": 3}}
    assert [*ways(4, batch=1)] == [ONE, "rows on 2", "rows on 4"]
    assert ways(4, batch=2)["guidance and rows on 4"] == {"batch": 2, "rows": 2}


def test_one_process_alone_is_told_to_start_several(tmp_path):
    with pytest.raises(T5Error, match="torchrun --nproc_per_node"):
        several_gpus.run(tmp_path / "x.json", [64], shape=SHAPE, layers="all", config=CONFIG)
