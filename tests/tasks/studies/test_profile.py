"""All stages in one process: in order, each told, an error kept, and nothing done twice."""

from pathlib import Path

import pytest
import yaml

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.studies import profile

ROOT = Path(__file__).parents[3]


def test_the_order_of_stages_serves_every_stage():
    stages, seen = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], set()
    for name in profile.stages_of(ROOT):
        needs = {Path(dep).stem for dep in stages[name]["do"]["deps"] if dep.startswith("data/out/")}
        assert needs <= seen
        seen.add(name)


def test_stages_are_told_one_by_one_and_an_error_is_kept(monkeypatch, tmp_path):
    asked, broken = [], {"two"}

    def run_stage(name, target, *, params, root):
        asked.append(name)
        if name in broken:
            raise RuntimeError("no memory")
        (root / f"data/out/{target}/{name}").mkdir(parents=True)
        return {"loss": 1.0}

    monkeypatch.setattr(profile, "run_stage", run_stage)
    out, run = tmp_path / "profile.json", lambda: profile.chain("x", {"a": 1}, ["one", "two", "three"], out, tmp_path)
    with pytest.raises(T5Error, match="stage 'two' of 'x' broke: RuntimeError: no memory"):
        run()
    assert list(read_json(out)["stages"]) == ["one", "two"]
    broken.clear()
    told = run()["stages"]
    assert asked == ["one", "two", "two", "three"] and told == read_json(out)["stages"]
    assert told["one"]["metrics"] == {"loss": 1.0} and all(each["seconds"] >= 0 for each in told.values())
