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
NO_RATE = [NAN, INF, -0.1, "1e-3", 1e30]
NO_SHARE = [NAN, INF, -0.1, 1.5]
NO_COUNT = [-1, 0.5, "2", HUGE]
NO_SEED = [-1, 1.5, 2**31, None]
NO_POSITIVE = [NAN, INF, 0, -1, 1e30]
MODEL = {"img_size": 84, "num_classes": 10}
MANY = 2**31 - 1
NO_SIZE, TOO_MANY, TOO_LARGE, NULL = [0, MANY], [MANY], [1e30], [None]

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
    "finetune.label_smoothing": [1, NAN],
    "finetune.trainable": ["blocks", "nwe"],
    "finetune.gradient_checkpointing": [NAN, 1.5, -0.5, "half", None],
    "finetune.checkpoints_kept": [-1, 101, 0.5],
    "finetune.batch_sise": [3],
    "finetun": [{}],
    "finetune": [3, [1], "all"],
    "convert.inner": ["swigloo", None, 3, "x" * 10**6],
    "convert.layers": [
        [12], [-1], [0, 0], [], [1.5], {}, {"0-12": "swiglu"}, {"5-2": "swiglu"}, {"x": "swiglu"}, {"0": "swiglo"},
        {"0-3": "swiglu", "2-4": "linear"}, {"0-11": "softmax"}, {"0-5": "softmax+nat3"}, "0-3", "papr",
        {"0-99999999": "swiglu"}, {"0-" + "9" * 9999: "swiglu"}, list(range(10**5)),
        {0: "swiglu", "0": "linear"}, {"0": "swiglu", "00": "linear"}, {"0,0": "swiglu"},
    ],
    "data.img_size": [85, [84, 85], 98, 0, -14, 84.0, "84"],
    "data.num_classes": [0, 11],
    "benchmark.dtype": ["fp8"],
    "fetch.sha256": ["abc", "g" * 64, "0" * 63, "", 123],
    "fetch.member_sha256": ["abc", "z" * 64],
    "fetch.source": [
        "https://me:secret@x/y.bin", "ftp://x", "pypi:torch", "hf:x", "file:", "file:\0", "", None, "https:///x",
        "https://[::1/x", "hf:a/b@main#../x", "hf:a/b@main#/etc/passwd", "hf:../b@main", "hf:a/b@../../x", "hf:a/b@c d",
    ],
    "fetch.architecture": ["vit_smol", "", None, "resnet50", "swin_tiny_patch4_window7_224"],
    "fetch.format": ["onnx", "pipelin", ["timm"]],
    "shards.train": [
        "data/x.json", "http://x/y.tar", "https://me:secret@x/y.tar", "hf://datasets/a/b/y.tar", "hf:a/b@main",
        "hf:datasets/a", "file:", "", None,
        "file:data/sd35-micro/train.json",
    ],
    "align.cosine": [NAN, -1],
    "align.graphs": ["yes", 2, None],
    "explain.map_images": [0, -1],
    **dict.fromkeys(("finetune.lora_alpha", "finetune.cutmix", "align.prefix"), TOO_LARGE),
    **dict.fromkeys(("finetune.batch_size", "calibrate.pool", "calibrate.reuse", "finetune.lora_rank"), NO_SIZE),
    **dict.fromkeys(("data.eval_batch_size", "benchmark.batch", "benchmark.warmup", "diagnose.images"), TOO_MANY),
    **dict.fromkeys(("evaluate", "explain", "source", "freeze.train", "finetune.augment"), NULL),
    "align.features": [
        "nrm", "", 3, "head", "patch_embed", "pos_drop", "fc_norm", "blocks.0.attn.attn_drop", "blocks.12",
    ],
    "calibrate.objective": ["attention"],
    "calibrate.warmup": [201, MANY, -1],
    "convert.init_std": [*NO_POSITIVE, 1e-300],
    "convert.radius": [NAN, 0, 1e30],
    "data.crop_pct": [0, 1.1, NAN, 1e-9],
    "data.mean": [[NAN, 0, 0], [0.5, 0.5], 0.5, [123.7, 116.3, 103.5], [1e30, 0, 0]],
    "data.std": [[0, 1, 1], [NAN, 1, 1], [1e-300, 1, 1], [58, 57, 57]],
    "explain.probes": [65, MANY],
    "benchmark.resolutions": [[85], [], [0], [84, 84.5], [84, 225], ["84"], [84, 84], [14 * 10**8]],
    "fetch.member": [None, "..", "", "a\0b", "../x", "/etc/passwd", "a/../b", "a\\b", "a/", "x" * 5000],
    "fetch.model_args": [
        {"img_size": 85, "num_classes": 10}, {"img_sise": 84}, {"num_classes": 11}, {"img_size": -84},
        *(MODEL | {name: value} for name, value in (
            ("depth", 0), ("depth", 10**6), ("depth", True), ("in_chans", 1), ("num_heads", -6), ("drop_rate", NAN),
            ("drop_path_rate", 5), ("drop_path_rate", 1), ("patch_drop_rate", 0.5), ("mlp_ratio", INF),
            ("init_values", NAN), ("img_size", [84]), ("img_size", None), ("act_layer", "nope"), ("embed_dim", 10**9),
            ("checkpoint_path", "/dev/zero"), ("cache_dir", "x"), ("pretrained", True), ("pretrained_cfg_overlay", {}),
        )),
    ],
    "finetune.augment.auto_augment": [
        "rnd-m9", "autoaug", "rand-m9-nope3", 7, "", "rand-m9-mstdnan", "rand-minf", "rand-m9-n0", "rand-m9-n1000000",
        "rand-m9-p2", "rand-m-9", "rand-m9-m5", "rand-tnope", "rand-m9-inc2", "original-mstdinf", "augmix-w0",
        "augmix-anan", "augmix-d-5", "3a-mstdnan",
    ],
    "finetune.augment.color_jitter": [-1, NAN, INF, 1e30],
    "finetune.augment.scale": [[0.9, 0.1], [0, 1], [0.5, NAN], [0.5], 0.5, [1e-30, 1e-30]],
    "finetune.clip_norm": [0, NAN, 1e-30],
    "source.finetune": [{"trainable": "new"}, {"trainable": "lora"}, {"distill": 0.5}],
    "shards.val": [f"file:{dots}data/fashion-mnist/train.json" for dots in ("", "./", "data/../")],
}  # fmt: skip
# Of a denoiser whose pipeline lies on this machine.
DENOISER: dict[str, list[Any]] = {
    "freeze.ceiling": [NAN, INF, 0, -1, "2", None],
    "convert.layers": [[99], {"0-99": "swiglu"}, []],
    "calibrate.batch_size": [10**4], "finetune.batch_size": [10**4],
    "diagnose.images": [10**4], "explain.images": [10**4],
    "shards.max_sequence_length": [0, 513], "evaluate.sampling.max_sequence_length": [0, 513],
    **dict.fromkeys(("evaluate", "evaluate.sampling", "shards.encode"), NULL),
    "align.features": ["pos_embed", "transformer_blocks.99"],
    "calibrate.warmup": [181],
    "shards.train": ["file:data/sd35-micro/val.json", "hf:datasets/a/b@main#x.tar"],
    "evaluate.sampling.batch_size": [MANY],
    "evaluate.samples": [15, 10**9],
    "fetch.features.model_args": [{"in_chans": 1}, {"drop_rate": NAN}, {"depth": 0}],
    "fetch.features.architecture": ["resnet50"],
    "shards.encode.buckets": [
        {"sizes": [[63, 64]]}, {"sizes": [[64]]},
        {"sizes": [[64, 64]] * 10**4, "resolution": 64}, {"sizes": [[0, 64]]}, {"resolution": 100}, {},
        {"sizes": [[64, 64], [64, 64]]}, {"sizes": [[4096, 4096]]}, {"resolution": 2**30},
        {"resolution": 64, "sizes": [[64, 64]]}, {"resolution": 60, "step": 10}, {"resolution": 64, "max_aspect": INF},
    ],
    "shards.encode.max_skipped": NO_SHARE,
    "data.drop": NO_SHARE,
    "data.objective": [
        {"weightng": "mode"}, {"shift": NAN}, {"shift": -1}, {"weighting": "mod"}, {"logit_mean": NAN},
        {"shift": 1e30}, {"logit_mean": 1e30}, {"mode_scale": 1e30},
    ],
    "evaluate.sampling.guidance": [*NO_RATE, 1e30],
    "evaluate.sampling.size": [[63, 64], [64], 64, [0, 64], [4096, 4096]],
    "evaluate.cutouts": ["data/x.json", "file:", "file:README.md"],
    "finetune.ema": [1, NAN],
    "finetune.align": [NAN, INF, -1],
    "benchmark.resolutions": [[65], [64, 63]],
    "benchmark.pixels_per_latent": [0, 8],
    "fetch.source": [
        "pypi:x==1", "https://x/y", "hf:datasets/a/b@main", "hf:a", "ftp:x",
        "file:/dev/zero", "file:README.md", "file:docs",
    ],
    "fetch.inception": ["https://x/i.pth", "data/x"],
    "fetch.features": [{}, None],
}  # fmt: skip
# Of a denoiser by class, what is otherwise than above.
BY_CLASS: dict[str, list[Any]] = {
    "evaluate.sampling.size": [[64, 64], [32, 64]],
    "evaluate.sampling.steps": [7, 1001, MANY],
    "shards.encode.buckets": [{"sizes": [[32, 64]]}],
    "shards.train": ["file:data/sd35-micro/train.json"],
    "data.objective": [{"shift": 3}, {"steps": 1001}, {"beta_start": 0.5}],
}


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
    ("target", "table", "least"),
    [("dinov2-fashion", CLASSIFIER, 300), ("sd35-micro", DENOISER, 90), ("dit-micro", BY_CLASS, 10)],
)
def test_no_bad_setting_is_accepted(target, table, least):
    tried, wrong = accepted(target, table)
    assert not wrong, wrong
    assert tried >= least


def test_settings_of_a_pipeline_of_the_hub_are_checked_against_it_once_it_is_fetched(tmp_path):
    good = params.read_target(ROOT, "sd35-medium")
    good["benchmark"]["resolutions"] = [64, 1023]
    good["shards"]["encode"]["buckets"] = {"sizes": [[64, 64]]}
    good["evaluate"]["sampling"]["size"] = [64, 64]
    targets.checked(good, "x", tmp_path)
    model = str(ROOT / "data/sd35-micro/model")
    write_json(tmp_path / "data/out/x/fetch/pipeline.json", {"source": good["fetch"]["source"], "path": model})
    with pytest.raises(T5Error, match=r"^x: .*1023 is not a multiple"):
        targets.checked(good, "x", tmp_path)


def test_a_limit_that_leaves_too_few_images_for_a_stage_is_refused_before_any_work(tmp_path):
    for change, message in (
        ({"shards": {"limit": 31}}, "diagnose.images is 32; expected at most 31, as many as shards.limit takes"),
        (
            {"shards": {"limit": 9}, "diagnose": {"images": 8}},
            "gives 9 images, as many as shards.limit takes; expected 16",
        ),
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
        ("a: {b: 1, c: 2, b: 3}", "'b' is given twice in a mapping, again on line 1"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  d: 1\n  d: 2", "'d' is given twice in a mapping, again on line 5"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a}", "'<<' is given twice"),
        ("layers: {0: softmax, '0': swiglu}", "'0' is given twice"),
        (BOMB, "holds more than 100000 values"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, x", "{x: 1}, {y: 2}"), "valid YAML|more than"),
        ("a: &a [*a]", "contains itself|recursive"),
        ("a: &a {b: *a}", "contains itself|recursive"),
        ("[\n" * 1500, "nested too deeply|not valid YAML"),
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
    [
        ("targets: {x: 3}", r"targets\.x is 3; expected a mapping"),
        ("targets: {x: null}", r"targets\.x is None"),
    ],
)
def test_a_target_without_sections_is_refused(text, message, tmp_path):
    write_text(tmp_path / "params.yaml", text)
    with pytest.raises(T5Error, match=message):
        params.read_target(tmp_path, "x")


def test_a_stage_refuses_a_slip_in_a_section_that_only_a_later_stage_reads(small_repo):
    small_repo.set("evaluate: {steps: 0}", "evaluate: {steps: 0, steps: 1}")
    run = small_repo.run(sys.executable, "-m", "tasks.fetch", "small")
    assert run.returncode == 1 and "'steps' is given twice" in run.stderr and small_repo.calls() == [0, 0, 0]
    small_repo.set("{steps: 0, steps: 1}", "{stepz: 0}")
    run = small_repo.run(sys.executable, "-m", "tasks.fetch", "small")
    assert run.returncode == 1 and "did you mean 'steps'" in run.stderr and small_repo.calls() == [0, 0, 0]
