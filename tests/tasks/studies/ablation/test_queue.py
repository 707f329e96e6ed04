"""The queue of DVC experiments: each holds its variant's settings, and none is lost in silence."""

import shutil
import subprocess
from pathlib import Path

import ablation
import pytest
import yaml

from t5lib.utils.errors import T5Error
from tasks.studies.ablation import definition, queue

DVC_YAML = """\
stages:
  convert:
    foreach: ${enabled}
    do:
      cmd: echo ${item}
      params: ["targets.${item}.convert"]
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with an ablation, its weights in git and its images not."""
    ablation.write_params(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "tasks").symlink_to(Path(definition.__file__).parents[1])
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / ".gitignore").write_text("/data\n")
    in_(tmp_path, "git", "init", "-q")
    in_(tmp_path, "git", "add", "-A")
    return tmp_path


def in_(root, *command):
    me = {f"GIT_{who}_{what}": "t5@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = queue.environment() | me | {"DVC_NO_ANALYTICS": "1"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def start_dvc(root):
    if not (root / ".git").exists():
        in_(root, "git", "init", "-q")
    in_(root, "dvc", "init", "-q")
    in_(root, "git", "add", "-A")
    in_(root, "git", "commit", "-qm", "start")


def experiments(root, **options):
    return queue.experiments(definition.resolve(root, "small"), root, **{"seeds": [0, 1]} | options)


def test_every_variant_but_the_softmax_control_is_an_experiment_with_its_own_settings(root):
    made = {experiment.name: experiment for experiment in experiments(root)}
    assert list(made) == [f"small-{v}-{seed}" for v in ("linear", "swiglu", "plain", "wide") for seed in (0, 1)]
    linear = made["small-linear-1"].changes
    assert {"convert.inner": "linear", "convert.locality": "none", "calibrate.lr": 0.02}.items() <= linear.items()
    assert linear["freeze.floor"] == 0.0  # 1.0 there
    assert linear["convert.seed"] == linear["calibrate.seed"] == linear["finetune.seed"] == 1
    assert "convert.seed" not in made["small-linear-0"].changes and "convert.key_norm" not in linear
    assert made["small-plain-0"].changes["calibrate.steps"] == 0


def test_only_sources_that_git_does_not_hold_are_named_by_their_full_path(root):
    changes = experiments(root, only=["swiglu"])[0].changes
    assert changes["shards.train"] == f"file:{root}/data/fashion-mnist-tiny/train.json"
    assert "fetch.source" not in changes


def test_values_are_spelled_as_hydra_reads_them():
    spelled = [queue._spelled(value) for value in (None, True, 1e-05, "dwc_qk+nat5", "it's", [0.5, None])]
    assert spelled == ["null", "true", "1e-05", "'dwc_qk+nat5'", r"'it\'s'", "[0.5,null]"]


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["dinov2-fashion-518", "smoke"])
def test_the_repositorys_own_params_survive_dvc(tmp_path, name):
    """DVC writes params.yaml anew, and folds lines in ways that not all YAML survives."""
    repository = Path(definition.__file__).parents[2]
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(repository / file, tmp_path)
    (tmp_path / "tasks").symlink_to(repository / "tasks")
    start_dvc(tmp_path)
    plan = definition.resolve(tmp_path, name)
    queue.put(queue.experiments(plan, tmp_path, seeds=[1], only=["swiglu"]), tmp_path)


@pytest.mark.pipeline
def test_dvc_queues_them_with_every_setting_and_a_lost_one_is_told(root):
    start_dvc(root)
    before = (root / "params.yaml").read_text()
    (linear,) = experiments(root, only=["linear"], seeds=[1])
    queue.put([linear], root)
    assert (root / "params.yaml").read_text() == before
    assert "small-linear-1" in in_(root, "dvc", "queue", "status")

    shared = yaml.safe_load(before)
    shared["targets"]["other"] = shared["targets"]["tiny"]  # dumped as an alias
    (root / "params.yaml").write_text(yaml.safe_dump(shared, sort_keys=False))
    in_(root, "git", "commit", "-qam", "alias")
    with pytest.raises(T5Error, match=r"(?s)small-linear-1 is queued without its .*convert.inner.* is an alias"):
        queue.put([queue.Experiment(name="small-linear-1", target="tiny", changes=linear.changes)], root)
