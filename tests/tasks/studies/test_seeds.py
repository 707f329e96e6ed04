"""Comparison over seeds: every seed reaches every setting, finished seeds are kept, and the arithmetic is right."""

from pathlib import Path

import pytest

from t5lib.report.models import KEYS
from t5lib.utils.errors import T5Error
from tasks.studies import common, seeds

ROOT = Path(__file__).parents[3]
STAGES = common.stages_of(ROOT, "evaluate")
SETTINGS = {"finetune": {"seed": 7, "lr": 1}, "freeze": {"train": {"seed": 7}}, "source": {"finetune": None}}


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[tuple[str, int]]:
    """Stand-in stages that note what they were asked and score seed-dependent figures, as those of a classifier."""
    calls = []

    def run_stage(name, target, *, params, root):
        seed = params["finetune"]["seed"]
        calls.append((name, seed))
        if seed == 9:
            raise T5Error("no images")
        scores = {key: {"top1": 80.0 + seed + i, "agreement": 90.0, "loss": 0.5, "n": 10} for i, key in enumerate(KEYS)}
        return {"models": scores, "error_after": 0.1} | ({"seconds": 1.5} if name != "convert" else {})

    monkeypatch.setattr(seeds, "run_stage", run_stage)
    monkeypatch.setattr(common, "machine", lambda: {"device": "a card", "torch": "2.11"})  # imports timm
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    return calls


def run(chosen: list[int], settings: dict = SETTINGS) -> dict:
    return seeds.run("x", settings, chosen, Path("out"), Path("work"))


def test_every_seed_runs_every_stage_once_and_is_kept(asked):
    assert STAGES[0] == "fetch" and STAGES[-1] == "evaluate"
    run([0, 2])
    assert asked == [(name, seed) for seed in (0, 2) for name in STAGES]
    run([0, 2, 5])
    assert len(asked) == 3 * len(STAGES)  # only seed 5 was new
    run([0], SETTINGS | {"finetune": {"seed": 7, "lr": 2}})
    assert len(asked) == 4 * len(STAGES)  # other settings: the old result does not count


def test_summary_and_table_hold_means_spreads_and_paired_gaps(asked):
    result = run([0, 2])
    assert result["summary"]["scores"]["source"]["top1"] == {"mean": 81.0, "std": pytest.approx(2**0.5)}
    assert result["summary"]["finetuned_minus_control"]["top1"] == {"mean": -1.0, "std": 0.0}
    assert result["summary"]["seconds"]["finetune"] == {"mean": 1.5, "std": 0.0}
    assert "convert" not in result["summary"]["seconds"] and set(result["seeds"]["0"]["stages"]) == set(STAGES[:-1])
    text = Path("out.md").read_text()
    assert "| model | top-1 (%) ↑ | agreement with source (%) ↑ | held-out loss ↓ |" in text
    assert "| source | 81.00 ± 1.41 | 90.00 ± 0.00 | 0.5000 ± 0.0000 |" in text
    assert "| finetuned − control | -1.00 ± 0.00 | 0.00 ± 0.00 | 0.0000 ± 0.0000 |" in text
    assert "top-1 (%) of every seed:" in text and "| source | 80.00 | 82.00 |" in text
    assert "Scores on 10 validation images." in text and "Device: a card, torch 2.11." in text
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("metric", "gaps", "row"),
    [
        ("top1", [3.0, 1.0], "| aligned − source | +3.00 | +1.00 | +2.00 | -4.31 |"),
        ("fid", [3.0, 1.0], "| aligned − source | +3.0 | +1.0 | +2.0 | +8.3 |"),
        ("top1", [3.0], "| aligned − source | +3.00 | +3.00 |  |"),
    ],
    ids=["higher is better", "lower is better", "one seed has no bound"],
)
def test_a_gap_is_shown_seed_by_seed_with_how_bad_its_mean_may_be(metric, gaps, row):
    scores = [{"source": {metric: 50.0, "n": 10}, "aligned": {metric: 50.0 + gap}} for gap in gaps]
    runs = {str(seed): {"models": models, "stages": {}} for seed, models in enumerate(scores)}
    result = {"target": "x", "device": "a card", "torch": "2.11", "seeds": runs}
    assert row in seeds.table(result | {"summary": seeds.summarize(list(runs.values()))}).splitlines()


def test_a_seed_that_broke_is_named_after_the_others_were_done(asked):
    with pytest.raises(T5Error, match="seed 9 failed: no images"):
        run([9, 0])
    assert asked[1:] == [(name, 0) for name in STAGES]
    run([0])
    assert len(asked) == 1 + len(STAGES)
