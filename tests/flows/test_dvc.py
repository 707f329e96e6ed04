"""DVC as a team uses it: a clone that pulls, experiments beside one another, their figures and curves."""

import json
import os
import sys

import pytest
import yaml

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("dvc")]

# DVC's own command line, one after another in one process: starting it takes two seconds.
DVC = "import shlex, sys; from dvc.cli import main; sys.exit(any(main(shlex.split(line)) for line in sys.argv[1:]))"
DRAWN = """\
(stage.out / "curves").mkdir()
    (stage.out / "curves/evaluate.csv").write_text(f"step,loss\\n1,{config.steps}\\n")
    return {"""


def dvc(repo, *commands: str) -> str:
    """What the commands print. Stages run as if MLflow were not installed, which is quicker."""
    site = repo.root / ".dvc/tmp/site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text('import sys; sys.modules["mlflow"] = None')
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    run = repo.run(sys.executable, "-c", DVC, *commands, PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def repo(make_small_repo, tmp_path_factory):
    """A repository whose results are committed and pushed, as docs/teams.md says, and the experiment `two`.

    Its last stage stands for `report`: it draws curves.
    """
    folder = tmp_path_factory.mktemp("team")
    repo = make_small_repo(folder / "repo")
    output = "data/out/${item}/evaluate"
    curves = f'plots: [{{"{output}/curves": {{x: step, y: loss}}}}]'
    repo.set(f'outs: ["{output}"]', f'{curves}\n      outs: ["{output}/result.txt"]', file="dvc.yaml")
    repo.set("return {", DRAWN, file="tasks/evaluate.py")
    for name, value in (("name", "t5"), ("email", "t5@example.com")):
        repo.git("config", f"user.{name}", value)
    repo.git("commit", "-qam", "curves")
    dvc(repo, f"remote add -q --default team {folder / 'remote'}", "repro -q")
    assert repo.git("status", "--short").splitlines() == [" M .dvc/config", "?? dvc.lock"]
    repo.git("add", "-A")
    repo.git("commit", "-qm", "results")
    dvc(repo, "push -q", "exp run -q --temp --name two -S targets.small.evaluate.steps=2")
    return repo


def test_a_second_clone_pulls_and_repeats_nothing(repo, tmp_path):
    clone = type(repo)(tmp_path / "clone")
    repo.git("clone", "-q", ".", str(clone.root))
    dvc(clone, "pull -q")
    (clone.root / "data/out/small/fetch/.DS_Store").touch()  # a file manager looked in
    assert "Data and pipelines are up to date" in dvc(clone, "repro")
    assert clone.calls() == [0, 0, 0]
    assert clone.git("status", "--short") == ""
    assert json.loads((clone.root / "data/out/small/evaluate.json").read_text()) == {"score": 0.0, "told": "swiglu"}


def test_an_experiment_in_a_folder_of_its_own_shows_its_own_figures_and_curves(repo):
    shown, plots = map(json.loads, dvc(repo, "exp show --json", "plots diff HEAD two --json").splitlines())
    states = [*shown, *(state for found in shown[1]["experiments"] for state in found["revs"])]
    scores = {state["name"]: _of_evaluate(state["data"]["metrics"])["data"]["score"] for state in states}
    assert scores == {None: 0.0, "master": 0.0, "two": 2.0}  # the working tree has no name
    [plot] = plots["data"].values()
    points = plot[0]["content"]["data"]["values"]
    assert [(point["rev"], float(point["loss"])) for point in points] == [("HEAD", 0.0), ("two", 2.0)]
    assert repo.git("status", "--short") == ""


def test_applying_an_experiment_brings_its_setting_and_its_results_and_repeats_nothing(repo):
    calls = repo.calls()
    printed = dvc(repo, "exp apply two", "repro", "metrics diff --json")
    assert "Data and pipelines are up to date" in printed
    assert repo.calls() == calls
    assert repo.git("status", "--short").splitlines() == [" M dvc.lock", " M params.yaml"]
    assert yaml.safe_load((repo.root / "params.yaml").read_text())["targets"]["small"]["evaluate"] == {"steps": 2}
    changes = json.loads(printed.splitlines()[-1])
    assert _of_evaluate(changes)["score"] == {"old": 0.0, "new": 2.0, "diff": 2.0}
    repo.git("checkout", "-q", "params.yaml")  # DVC wrote it anew; the setting written by hand is as good
    repo.set("evaluate: {steps: 0}", "evaluate: {steps: 2}")
    assert "Data and pipelines are up to date" in dvc(repo, "repro")
    assert repo.calls() == calls
    assert repo.git("diff", "--stat", "params.yaml").endswith("1 file changed, 1 insertion(+), 1 deletion(-)\n")


def _of_evaluate(metrics: dict) -> dict:
    return metrics["data/out/small/evaluate.json"]
