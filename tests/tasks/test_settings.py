"""No bad setting is accepted: all of a target are checked before its first stage."""

import copy
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json, write_text
from tasks import targets
from tasks.runtime import params

ROOT = Path(__file__).parents[2]
NAN, INF, HUGE = math.nan, math.inf, 10**30
NO_RATE = [NAN, INF, -0.1, "1e-3"]
NO_SHARE = [NAN, INF, -0.1, 1.5]
NO_COUNT = [-1, 0.5, "2", HUGE]
NO_SEED = [-1, 1.5, 2**31, None]
NO_POSITIVE = [NAN, INF, 0, -1]

# By setting, of a classifier: values that cannot be right.
CLASSIFIER: dict[str, list[Any]] = {
    "freeze.floor": [NAN, INF, -INF, -1, 101, "60", None, True],
    "freeze.train.trainable": ["all", "lora"],
    **dict.fromkeys(("freeze.train.lr_new", "finetune.lr", "align.lr", "calibrate.lr_inherited"), NO_RATE),
    **dict.fromkeys(("calibrate.lr", "finetune.epochs", "align.block_growth", "convert.key_norm_eps"), NO_POSITIVE),
    **dict.fromkeys(("finetune.weight_decay", "finetune.mixup", "source.l2", "align.output"), NO_RATE),
    **dict.fromkeys(("finetune.min_lr", "finetune.warmup", "finetune.distill"), NO_SHARE),
    **dict.fromkeys(("finetune.augment.hflip", "finetune.augment.re_prob"), NO_SHARE),
    **dict.fromkeys(("calibrate.steps", "finetune.accumulate", "data.workers", "benchmark.repeats"), NO_COUNT),
    **dict.fromkeys(("diagnose.seed", "convert.seed", "calibrate.seed", "finetune.seed", "fetch.seed"), NO_SEED),
    "finetune.ema": [0, 1, NAN],
    "finetune.clip_norm": [0, NAN],
    "finetune.label_smoothing": [1, NAN],
    "finetune.trainable": ["blocks", "nwe"],
    "finetune.batch_sise": [3],
    "finetun": [{}],
    "finetune": [3, [1], "all"],
    "finetune.augment.auto_augment": ["rnd-m9", "autoaug", "rand-m9-nope3", 7],
    "finetune.augment.scale": [[0.9, 0.1], [0, 1], [0.5, NAN], [0.5], 0.5],
    "finetune.augment.color_jitter": [-1, NAN, INF],
    "convert.inner": ["swigloo", None, 3, "x" * 10**6],
    "convert.radius": [NAN, 0],
    "convert.init_std": NO_POSITIVE,
    "convert.layers": [
        [12], [-1], [0, 0], [], [1.5], {}, {"0-12": "swiglu"}, {"5-2": "swiglu"}, {"x": "swiglu"}, {"0": "swiglo"},
        {"0-3": "swiglu", "2-4": "linear"}, {"0-11": "softmax"}, {"0-5": "softmax+nat3"}, "0-3", "papr",
        {"0-99999999": "swiglu"}, {"0-" + "9" * 9999: "swiglu"}, list(range(10**5)),
    ],
    "data.img_size": [85, [84, 85], 98, 0, -14, 84.0, "84"],
    "data.num_classes": [0, 11],
    "data.mean": [[NAN, 0, 0], [0.5, 0.5], 0.5],
    "data.std": [[0, 1, 1], [NAN, 1, 1]],
    "data.crop_pct": [0, 1.1, NAN],
    "benchmark.resolutions": [[85], [], [0], [84, 84.5], [84, 225], ["84"]],
    "benchmark.dtype": ["fp8"],
    "fetch.sha256": ["abc", "g" * 64, "0" * 63, "", 123],
    "fetch.member_sha256": ["abc", "z" * 64],
    "fetch.member": [None, ".."],
    "fetch.source": [
        "https://me:secret@x/y.bin", "ftp://x", "pypi:torch", "hf:x", "file:", "file:\0", "", None, "https:///x",
        "https://[::1/x",
    ],
    "fetch.architecture": ["vit_smol", "", None, "resnet50", "swin_tiny_patch4_window7_224"],
    "fetch.format": ["onnx", "pipelin", ["timm"]],
    "fetch.model_args": [{"img_size": 85, "num_classes": 10}, {"img_sise": 84}, {"num_classes": 11}, {"img_size": -84}],
    "shards.train": ["data/x.json", "https://x/y.tar", "hf:a/b@main", "hf:datasets/a", "file:", "", None],
    "align.features": ["nrm", "", 3],
    "align.cosine": [NAN, -1],
    "explain.map_images": [0, -1],
}  # fmt: skip
# Of a denoiser whose pipeline lies on this machine.
DENOISER: dict[str, list[Any]] = {
    "freeze.ceiling": [NAN, INF, 0, -1, "2", None],
    "convert.layers": [[99], {"0-99": "swiglu"}, []],
    "shards.encode.buckets": [
        {"sizes": [[63, 64]]}, {"sizes": [[64]]},
        {"sizes": [[64, 64]] * 10**4, "resolution": 64}, {"sizes": [[0, 64]]}, {"resolution": 100}, {},
        {"resolution": 64, "sizes": [[64, 64]]}, {"resolution": 60, "step": 10}, {"resolution": 64, "max_aspect": INF},
    ],
    "shards.encode.max_skipped": NO_SHARE,
    "data.drop": NO_SHARE,
    "data.objective": [{"weightng": "mode"}, {"shift": NAN}, {"shift": -1}, {"weighting": "mod"}, {"logit_mean": NAN}],
    "evaluate.sampling.guidance": NO_RATE,
    "evaluate.sampling.size": [[63, 64], [64], 64, [0, 64]],
    "evaluate.cutouts": ["data/x.json", "file:"],
    "finetune.ema": [1, NAN],
    "finetune.align": [NAN, INF, -1],
    "benchmark.resolutions": [[65], [64, 63]],
    "benchmark.pixels_per_latent": [0, 8],
    "fetch.source": ["pypi:x==1", "https://x/y", "hf:datasets/a/b@main", "hf:a", "ftp:x"],
    "fetch.inception": ["https://x/i.pth", "data/x"],
    "fetch.features": [{}, None],
}  # fmt: skip


def accepted(target: str, table: dict[str, list[Any]]) -> tuple[int, list[str]]:
    """How many values were tried, and those that no error of one short line refused."""
    good, tried, wrong = params.read_target(ROOT, target), 0, []
    targets.checked(good, target, ROOT)
    for path, values in table.items():
        *sections, name = path.split(".")
        for value in values:
            settings, tried = copy.deepcopy(good), tried + 1
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
            try:
                targets.checked(settings, target, ROOT)
                wrong.append(f"{path}: {value!r:.60} was accepted")
            except T5Error as error:
                if len(str(error)) > 900 or "secret" in str(error):
                    wrong.append(f"{path}: {str(error)[:200]}")
    return tried, wrong


@pytest.mark.parametrize(
    ("target", "table", "least"), [("dinov2-fashion", CLASSIFIER, 190), ("sd35-micro", DENOISER, 50)]
)
def test_no_bad_setting_is_accepted(target, table, least):
    tried, wrong = accepted(target, table)
    assert not wrong, wrong
    assert tried >= least


def test_settings_of_a_pipeline_of_the_hub_are_checked_against_it_once_it_is_fetched(tmp_path):
    good = params.read_target(ROOT, "sd35-medium")
    good["benchmark"]["resolutions"] = [512, 1023]
    targets.checked(good, "x", tmp_path)
    model = str(ROOT / "data/sd35-micro/model")
    write_json(tmp_path / "data/out/x/fetch/pipeline.json", {"source": good["fetch"]["source"], "path": model})
    with pytest.raises(T5Error, match=r"^x: .*1023 is no multiple"):
        targets.checked(good, "x", tmp_path)


def test_a_limit_that_leaves_too_few_images_for_a_stage_is_refused_before_any_work(tmp_path):
    for change, message in (
        ({"shards": {"limit": 31}}, "shards.limit is 31, but diagnose.images needs 32 images"),
        ({"shards": {"limit": 9}, "diagnose": {"images": 8}}, "shards.limit is 9, but evaluate needs 16 images"),
    ):
        settings = params.read_target(ROOT, "sd35-micro")
        settings |= {section: settings[section] | values for section, values in change.items()}
        with pytest.raises(T5Error, match=message):
            targets.checked(settings, "x", tmp_path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, c: 2, b: 3}", "'b' stands twice in one mapping, again in line 1"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  d: 1\n  d: 2", "'d' stands twice in one mapping, again in line 5"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a}", "'<<' stands twice"),
        ("layers: {0: softmax, '0': swiglu}", "'0' stands twice"),
        (BOMB, "stands for more than 100000 values"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, x", "{x: 1}, {y: 2}"), "valid YAML|more than"),
        ("a: &a [*a]", "holds itself|recursive"),
        ("a: &a {b: *a}", "holds itself|recursive"),
        ("[\n" * 1500, "absurdly deep|not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: 2020-99-99", "not valid YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_hides_something_or_explodes_is_one_short_error(text, message, tmp_path):
    for read in (lambda: params.parsed(text, "my.yaml"), lambda: params.changed({}, [f"x={text}"], "t")):
        with pytest.raises(T5Error, match=message) as caught:
            read()
        assert len(str(caught.value)) < 700
    write_text(tmp_path / "params.yaml", text)
    with pytest.raises(T5Error, match=message):
        params.read(tmp_path)


def test_a_key_may_replace_what_is_merged_in():
    assert params.parsed("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}", "x")["d"] == {"b": 3, "c": 2}


def test_params_that_are_a_pipe_or_a_hole_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")
    with pytest.raises(T5Error, match="is a device, pipe or socket"):
        params.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("targets: {x: 3}", r"targets\.x is 3; expected its sections"), ("targets: {x: null}", r"targets\.x is None")],
)
def test_a_target_without_sections_is_refused(text, message, tmp_path):
    write_text(tmp_path / "params.yaml", text)
    with pytest.raises(T5Error, match=message):
        params.read_target(tmp_path, "x")


def test_a_stage_refuses_a_slip_in_a_section_that_only_a_later_stage_reads(small_repo):
    small_repo.set("evaluate: {steps: 0}", "evaluate: {steps: 0, steps: 1}")
    run = small_repo.run(sys.executable, "-m", "tasks.fetch", "small")
    assert run.returncode == 1 and "'steps' stands twice" in run.stderr and small_repo.calls() == [0, 0, 0]
    small_repo.set("{steps: 0, steps: 1}", "{stepz: 0}")
    run = small_repo.run(sys.executable, "-m", "tasks.fetch", "small")
    assert run.returncode == 1 and "did you mean 'steps'" in run.stderr and small_repo.calls() == [0, 0, 0]
