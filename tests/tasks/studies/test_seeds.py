"""Comparison over seeds: every seed reaches every setting, finished seeds are kept, and the arithmetic is right."""

import pytest

from tasks.evaluate import MODELS
from tasks.studies import seeds


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Stand-in stages that record what they were asked and score seed-dependent figures."""
    asked = []

    def run_stage(name, target, *, params, root):
        seed = params["finetune"]["seed"]
        asked.append((name, seed))
        scores = {model: {"top1": 80.0 + seed + i, "agreement": 90.0, "n": 10} for i, model in enumerate(MODELS)}
        return {"models": scores, "seconds": 1.5, "error_after": 0.1}

    settings = {"finetune": {"seed": 7, "lr": 1}, "freeze": {"train": {"seed": 7}}, "source": {"finetune": None}}
    monkeypatch.setattr(seeds, "run_stage", run_stage)
    monkeypatch.setattr(seeds, "resolve", lambda root, target: settings)
    monkeypatch.chdir(tmp_path)
    return asked


def test_with_seed_reaches_nested_settings_and_nothing_else():
    settings = {"seed": 7, "freeze": {"train": {"seed": 7, "lr": 1}}, "source": None}
    assert seeds.with_seed(settings, 3) == {"seed": 3, "freeze": {"train": {"seed": 3, "lr": 1}}, "source": None}


def test_every_seed_runs_every_stage_once_and_is_kept(stages, tmp_path):
    run = lambda seeds, changes: seeds.compare("x", seeds, tmp_path / "out", tmp_path / "work", changes)  # noqa: E731
    run([0, 2], {})
    assert stages == [(name, seed) for seed in (0, 2) for name in seeds.STAGES]
    run([0, 2, 5], {})
    assert len(stages) == 3 * len(seeds.STAGES)  # only seed 5 was new
    run([0], {"finetune.lr": 2})
    assert len(stages) == 4 * len(seeds.STAGES)  # other settings: the old result does not count


def test_summary_and_table_hold_means_spreads_and_paired_gaps(stages, tmp_path):
    result = seeds.compare("x", [0, 2], tmp_path / "out", tmp_path / "work", {})
    assert result["summary"]["top1"]["source"] == {"mean": 81.0, "std": pytest.approx(2**0.5)}
    assert result["summary"]["finetuned_minus_control"] == {"mean": -1.0, "std": 0.0}
    text = (tmp_path / "out.md").read_text()
    assert "| source | 80.00 | 82.00 | 81.00 ± 1.41 | 90.00 ± 0.00 |" in text
    assert "Fine-tuned T5 minus control: -1.00 ± 0.00 points." in text
