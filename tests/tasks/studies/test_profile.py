"""All stages in one process: in order, each noted, an error kept, and nothing done twice."""

import pytest

from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.studies import profile


def test_stages_are_noted_one_by_one_and_an_error_is_kept(monkeypatch, tmp_path):
    asked, broken = [], {"two"}

    def run_stage(name, target, *, params, root):
        asked.append(name)
        if name in broken:
            raise RuntimeError("no memory")
        (root / f"data/out/{target}/{name}").mkdir(parents=True)
        return {"loss": 1.0}

    monkeypatch.setattr(profile, "run_stage", run_stage)
    out = tmp_path / "profile.json"
    run = lambda: profile.run("x", {"a": 1}, ["one", "two", "three"], out, tmp_path)  # noqa: E731
    with pytest.raises(T5Error, match="stage 'two' of 'x' failed: RuntimeError: no memory"):
        run()
    assert list(read_json(out)["stages"]) == ["one", "two"]
    broken.clear()
    stages = run()["stages"]
    assert asked == ["one", "two", "two", "three"] and stages == read_json(out)["stages"]
    assert stages["one"]["metrics"] == {"loss": 1.0} and all(each["seconds"] >= 0 for each in stages.values())
