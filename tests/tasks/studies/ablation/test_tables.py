"""Tables and pictures follow from the result file alone, and tell what is missing and why."""

import ablation
import pytest
from PIL import Image

from t5lib.utils.errors import T5Error
from tasks.studies.ablation import tables


@pytest.fixture
def written(tmp_path):
    tables.write(ablation.result(), tmp_path / "docs/small")
    return tmp_path / "docs"


def lines(folder):
    return (folder / "small.md").read_text().splitlines()


def test_a_row_holds_means_spreads_the_gap_to_control_seed_by_seed_and_the_papers_figures(written):
    (row,) = [line for line in lines(written) if line.startswith("| linear")]
    assert row == "| linear | 81.00 ± 1.41 | 91.00 ± 1.41 | -2.50 ± 0.71 | 63.30 | 0.055 | 0.53 |"


def test_what_diverged_or_was_not_possible_or_not_run_is_told(written):
    rows = {line.split("|")[1].strip(): line for line in lines(written) if line.startswith("| ")}
    assert "| 91.00 (1 of 2 seeds) | -2.00 (1 of 2 seeds) | 69.25 (best) |" in rows["swiglu"]
    assert rows["nat5"].startswith("| nat5 | not possible | not possible | – |")
    assert "not" not in rows  # a table of which nothing was run is left out


def test_a_row_with_fewer_seeds_than_the_head_names_says_so(tmp_path):
    result = ablation.result()
    del result["records"]["linear"]["1"]
    tables.write(result, tmp_path / "small")
    (row,) = [line for line in lines(tmp_path) if line.startswith("| linear")]
    assert row.count("(1 of 2 seeds)") == 3 and "±" not in row


def test_the_head_tells_references_budget_and_where_it_ran(written):
    text = "\n".join(lines(written))
    for part in (
        "1,000 validation images, mean ± standard deviation over the seeds 0, 1",
        "Softmax source 92.50 ± 0.71; softmax trained like the fine-tuned ones (control) 93.50 ± 0.71",
        "Device: a card; torch 2.11; code abc",
        "Budget: calibration 600 steps of 64 images; finetune epochs 1, batches of 128",
        "All alike.",
        "Paper: DeiT-Tiny",
    ):
        assert part in text


def test_every_table_has_its_picture(written):
    assert sorted(file.name for file in written.iterdir()) == ["small-inner.png", "small-window.png", "small.md"]
    assert "![Inner models](small-inner.png)" in lines(written)
    with Image.open(written / "small-inner.png") as picture:
        assert picture.width == 980


def test_the_picture_is_drawn_from_the_rows():
    result = ablation.result()
    table = tables.from_dict(tables.Table, result["tables"]["inner"], "")
    figure = tables.dots(table, tables.rows_of(result, table), tables.softmax(result))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["linear", "swiglu"]
    drawn = {tuple(line.get_xdata()) for line in axes.lines}
    assert {(81.0, 88.25), (91.0, 91.0), (93.5, 93.5), (92.5, 92.5)} <= drawn
    low, high = axes.get_xlim()
    assert low < 79 and high > 94.2


def test_an_empty_result_is_refused(tmp_path):
    with pytest.raises(T5Error, match="'small' has no result yet"):
        tables.write(ablation.result() | {"records": {}}, tmp_path / "x")
