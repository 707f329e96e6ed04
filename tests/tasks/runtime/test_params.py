"""params.yaml: slips are named before work starts, and adding a target leaves the rest of the file alone."""

import json
import sys
from pathlib import Path

import pytest

from t5lib.utils.errors import T5Error
from tasks import targets
from tasks.runtime import params


def check(repo, target="small"):
    return repo.run(sys.executable, "-m", "tasks.targets", target)


def test_enabling_a_target_changes_one_word_and_keeps_comments(small_repo):
    before = (small_repo.root / "params.yaml").read_text()
    assert params.enable(small_repo.root, "other")
    after = (small_repo.root / "params.yaml").read_text()
    assert after == before.replace("[small]   #", "[small, other] #")
    assert not params.enable(small_repo.root, "other")
    assert (small_repo.root / "params.yaml").read_text() == after


def test_the_first_target_can_be_enabled_in_an_empty_list(small_repo):
    small_repo.set("enabled: [small]", "enabled:")
    params.enable(small_repo.root, "other")
    assert params.read(small_repo.root)["enabled"] == ["other"]


def test_unknown_target_is_refused_with_the_nearest_and_nothing_is_written(small_repo):
    before = (small_repo.root / "params.yaml").read_text()
    with pytest.raises(T5Error, match=r"no target 'othr'; did you mean 'other'\? Targets: small, other"):
        params.enable(small_repo.root, "othr")
    assert (small_repo.root / "params.yaml").read_text() == before


def test_check_prints_every_setting_with_defaults(small_repo):
    told = json.loads(check(small_repo).stdout)
    assert told["fetch"]["inner"] == "2"
    assert told["evaluate"] == {
        "inner": "swiglu", "steps": 0, "seconds": 0.0, "fail": "", "retryable": False, "crash": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{steps: 0}", "{stepps: 0}", "targets.small.evaluate: unknown setting 'stepps'; did you mean 'steps'?"),
        ("{steps: 0}", "{steps: many}", "targets.small.evaluate.steps: expected int, got 'many'"),
        (
            "evaluate:",
            "evaluat:",
            "targets.small.evaluat is read by no stage; known sections: convert, evaluate, fetch",
        ),
        ("    evaluate: {steps: 0}\n", "", "targets.small lacks the sections evaluate; add them, empty if need be"),
        ("targets:", "tagrets:", "params.yaml has no `targets:`"),
        (
            "{steps: 0}",
            "{steps: 0",
            "params.yaml is not valid YAML: line 8: expected ',' or '}', but got ':' (while parsing a flow mapping, "
            "which begins in line 7)",
        ),
    ],
    ids=["unknown", "type", "section", "missing", "targets", "yaml"],
)
def test_check_names_a_slip_in_any_section(small_repo, old, new, message):
    small_repo.set(old, new)
    run = check(small_repo)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_outside_the_repository_the_message_says_where_to_go(tmp_path):
    with pytest.raises(T5Error, match="run this from the repository's folder"):
        params.read(tmp_path)


def test_a_changed_target_is_written_beside_the_others_and_read_as_what_it_is(small_repo):
    root, before = small_repo.root, (small_repo.root / "params.yaml").read_text()
    words = ["evaluate.steps=7", "convert.lr=5.0e-05", "convert.more.names=['yes', '1e-3', null]"]
    params.write_changed(root, "small", words, "small-set")
    assert (root / "params.yaml").read_text().startswith(before)
    made = params.read_target(root, "small-set")
    assert made == params.changed(params.read_target(root, "small"), words, "small")
    assert (made["evaluate"]["steps"], made["convert"]["lr"]) == (7, 5e-5)
    assert made["convert"]["more"] == {"names": ["yes", "1e-3", None]}
    assert params.takes(root, "small-set") == ""  # it takes another time

    params.write_changed(root, "small", ["evaluate.steps=8"], "small-set")
    assert params.read_target(root, "small-set")["evaluate"] == {"steps": 8}
    assert list(params.read(root)["targets"]) == ["small", "other", "small-set"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("other", "already defines a target 'other'; take another name"), ("a/b", "'a/b' is not a name for a target")],
)
def test_a_changed_target_takes_no_place_of_another(small_repo, name, message):
    before = (small_repo.root / "params.yaml").read_text()
    with pytest.raises(T5Error, match=message):
        params.write_changed(small_repo.root, "small", ["evaluate.steps=7"], name)
    assert (small_repo.root / "params.yaml").read_text() == before


def test_a_change_is_one_of_the_named_setting_also_where_sections_share_a_yaml_alias():
    root = Path(__file__).parents[3]
    found = params.changed(params.read_target(root, "deit-tiny"), ["finetune.augment.hflip=0.0"], "deit-tiny")
    assert (found["finetune"]["augment"]["hflip"], found["freeze"]["train"]["augment"]["hflip"]) == (0.0, 0.5)


def test_settings_are_replaced_by_words_at_any_depth_and_checked():
    root = Path(__file__).parents[3]
    words = ["evaluate.sampling.steps=3", "shards.train=file:elsewhere.json", "convert.layers={0-1: swiglu}"]
    found = targets.resolve(root, "sd35-micro", words)
    assert found["evaluate"]["sampling"] == targets.resolve(root, "sd35-micro")["evaluate"]["sampling"] | {"steps": 3}
    assert found["shards"]["train"] == "file:elsewhere.json" and found["convert"]["layers"] == {"0-1": "swiglu"}
    for word, message in (
        ("evaluate.sampling.stepps=3", "unknown setting 'stepps'; did you mean 'steps'"),
        ("evaluate.samples.steps=3", "'samples' is not a section of sd35-micro"),
        ("steps=3", "sd35-micro with --set.steps is read by no stage"),
        ("finetune.steps", "expected SECTION.NAME=VALUE"),
    ):
        with pytest.raises(T5Error, match=message):
            targets.resolve(root, "sd35-micro", [word])
