"""DVC as a team uses it: a clone that pulls, experiments beside one another, their figures and curves."""

import json
import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("dvc")]

DRAWN = """\
(stage.out / "curves").mkdir()
    (stage.out / "curves/evaluate.csv").write_text(f"step,loss\\n1,{config.steps}\\n")
    return {"""
CHANGE = "targets.small.evaluate.steps=2"


@pytest.fixture(scope="module")
def repo(make_small_repo, tmp_path_factory):
    """A repository whose results are committed and pushed, as docs/teams.md says, and the experiment `two`.

    Its last stage stands for `report`: it draws curves.
    """
    folder = tmp_path_factory.mktemp("team")
    repo = make_small_repo(folder / "repo")
    outputs = '["data/out/${item}/evaluate"]'
    curves = 'plots: [{"data/out/${item}/evaluate/curves": {x: step, y: loss}}]'
    repo.set(f"outs: {outputs}", f"{curves}\n      outs: {outputs[:-2]}/result.txt\"]", file="dvc.yaml")
    repo.set("return {", DRAWN, file="tasks/evaluate.py")
    repo.git("config", "user.name", "t5")
    repo.git("config", "user.email", "t5@example.com")
    dvc(repo, "remote", "add", "--default", "team", str(folder / "remote"))
    repo.git("add", "-A")
    repo.git("commit", "-qm", "curves and a remote")
    dvc(repo, "repro", "-q")
    assert repo.git("status", "--short") == "?? dvc.lock\n"
    repo.git("add", "dvc.lock")
    repo.git("commit", "-qm", "results")
    dvc(repo, "push", "-q")
    dvc(repo, "exp", "run", "-q", "--temp", "--name", "two", "--set-param", CHANGE)
    return repo


def dvc(repo, *arguments: str) -> str:
    """What the command prints; its stages run as if MLflow were not installed, which is quicker."""
    site = Path(repo.root / ".dvc/tmp/site")
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text('import sys; sys.modules["mlflow"] = None')
    run = repo.run("dvc", *arguments, PYTHONPATH=os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_second_clone_pulls_and_repeats_nothing(repo, tmp_path):
    clone = type(repo)(tmp_path / "clone")
    repo.git("clone", "-q", ".", str(clone.root))
    dvc(clone, "pull", "-q")
    assert "Data and pipelines are up to date" in dvc(clone, "repro")
    assert clone.calls() == [0, 0, 0]
    assert clone.git("status", "--short") == ""
    assert json.loads((clone.root / "data/out/small/evaluate.json").read_text()) == {"score": 0.0, "told": "swiglu"}


def test_an_experiment_in_a_folder_of_its_own_shows_its_own_figures_and_leaves_the_working_tree_alone(repo):
    shown = {}
    for baseline in json.loads(dvc(repo, "exp", "show", "--json")):
        for state in [baseline, *(state for found in baseline["experiments"] or [] for state in found["revs"])]:
            figures = state["data"]["metrics"]["data/out/small/evaluate.json"]["data"]
            shown[state["name"] or state["rev"]] = figures["score"]
    assert shown == {"workspace": 0.0, "master": 0.0, "two": 2.0}
    assert repo.git("status", "--short") == ""


def test_curves_of_an_experiment_are_drawn_beside_those_it_came_from(repo):
    [plot] = json.loads(dvc(repo, "plots", "diff", "HEAD", "two", "--json"))["data"].values()
    points = plot[0]["content"]["data"]["values"]
    assert [(point["rev"], float(point["loss"])) for point in points] == [("HEAD", 0.0), ("two", 2.0)]


def test_applying_an_experiment_changes_its_setting_and_its_record_alone(repo):
    calls = repo.calls()
    dvc(repo, "exp", "apply", "two")
    assert repo.git("status", "--short").splitlines() == [" M dvc.lock", " M params.yaml"]
    assert repo.git("diff", "--unified=0", "params.yaml").splitlines()[-2:] == [
        "-    evaluate: {steps: 0}",
        "+    evaluate: {steps: 2}",
    ]
    assert "Data and pipelines are up to date" in dvc(repo, "repro")
    assert repo.calls() == calls
    [change] = json.loads(dvc(repo, "metrics", "diff", "--json"))["diff"].values()
    assert change["score"] == {"old": 0.0, "new": 2.0, "diff": 2.0}
