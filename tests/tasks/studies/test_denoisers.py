"""Studies of denoisers, on tiny ones of both families: seeds, curves, and the export as a pipeline."""

import shutil
from pathlib import Path

import denoiser_target
import pytest
import torch

import t5lib
from t5lib.pipelines import load_pipeline
from t5lib.report import plots
from t5lib.report.models import KEYS
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, write_json
from tasks.studies import common, curves, seeds
from tasks.studies import export as export_module
from tasks.studies.export import export
from tasks.targets import checked

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pictures take longer to draw than models to fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 20)
        yield


KINDS = [
    pytest.param("dit", marks=pytest.mark.xdist_group("dit-studies")),
    pytest.param("sd3", marks=[pytest.mark.slow, pytest.mark.xdist_group("sd3-studies")]),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(kind, tmp_path_factory) -> Path:
    """A repository with the target's weights and images, without outputs."""
    root = tmp_path_factory.mktemp(kind)
    (root / "data").mkdir()
    shutil.copy(ROOT / "dvc.yaml", root)
    denoiser_target.write(root, kind)
    return root


@pytest.fixture
def settings(kind, root, monkeypatch) -> dict:
    """Resolved, as every study is given them; the repository is the working folder."""
    monkeypatch.chdir(root)
    return checked(denoiser_target.settings(kind, root), "tiny")


@pytest.fixture(scope="module")
def over_seeds(kind, root) -> dict:
    """The study of two seeds, the second made up from the first's figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        settings = checked(denoiser_target.settings(kind, root), "tiny")
        first = seeds.run("tiny", settings, [0], root / "out/tiny", root / "work")["seeds"]["0"]
        second = first | {"settings": common.with_seed(settings, 1)}
        (root / "work/seed-1").mkdir()
        write_json(root / "work/seed-1/result.json", second)
        patch.setattr(seeds, "run_stage", None)  # both are done
        return seeds.run("tiny", settings, [0, 1], root / "out/tiny", root / "work")


def test_seeds_of_a_denoiser_show_every_score_it_has(over_seeds, root):
    models, summary = over_seeds["seeds"]["0"]["models"], over_seeds["summary"]
    assert list(models) == [*KEYS, "real images"]
    for name, score in models.items():
        for metric, value in summary["scores"][name].items():
            assert value == {"mean": pytest.approx(score[metric]), "std": 0.0}
    assert {"loss", "fd_dinov2", "retrieval_r1"} <= summary["scores"]["finetuned"].keys()
    gap = models["finetuned"]["fd_dinov2"] - models["control"]["fd_dinov2"]
    assert summary["finetuned_minus_control"]["fd_dinov2"]["mean"] == pytest.approx(gap)
    assert set(summary["seconds"]) == {"calibrate", "align", "freeze", "finetune", "control"}
    text = (root / "out/tiny.md").read_text()
    assert "held-out loss ↓ | FD-DINOv2 ↓" in text and "FD-DINOv2 of every seed" in text
    assert "16 images a model, the same prompts and noise for all, beside 16 real ones" in text
    assert f"| control | {models['control']['loss']:.4f} ± 0.0000 | " in text
    assert (root / "out/tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_is_exported_as_a_pipeline_with_its_figures(over_seeds, root, kind, tmp_path):
    work, out = root / "work/seed-0", tmp_path / "tiny-t5"
    (root / kind / "LICENSE.md").write_text("the terms")
    (root / kind / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n")
    export("tiny", out, root=work, dtype="fp32")
    weights = t5lib.load(work / "data/out/tiny/finetune").state_dict()
    exported = load_pipeline(out).transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in exported.items())
    card, loss = (out / "README.md").read_text(), over_seeds["seeds"]["0"]["models"]["finetuned"]["loss"]
    assert f"{loss:.4f}" in card and "FD-DINOv2" in card and "python -m flows.t5 tiny" in card
    assert "license_name: some-licence" in card and (out / "LICENSE.md").read_text() == "the terms"
    with pytest.raises(T5Error, match="exists already"):
        export("tiny", out, root=work)
    with pytest.raises(T5Error, match="does not exist; run"):
        export("other", tmp_path / "other", root=work)


def test_a_classifier_needs_no_export_and_that_is_told(tmp_path, monkeypatch):
    for name in ("fetch", "finetune", "evaluate"):
        (tmp_path / "data/out/tiny" / name).mkdir(parents=True)
    with pytest.raises(
        T5Error, match=r"'tiny' is a classifier, which needs no export: .* takes .*tiny/finetune, which"
    ):
        export("tiny", tmp_path / "out", root=tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("targets: {small: {fetch: {}}}")  # of which nothing is built yet
    for target, told in (("small", "'small' is a classifier, which needs no export"), ("smal", "mean 'small'")):
        monkeypatch.setattr("sys.argv", ["export", target, "--out", "out"])
        with pytest.raises(SystemExit, match=told):
            export_module.main()


def test_curves_of_every_arm_and_seed_are_drawn_once(settings, root, kind, tmp_path, monkeypatch):
    options = {"layers": ["all"], "steps": [0, 2], "seeds": [0, 1], "out": tmp_path / "tiny", "work": tmp_path / "work"}
    result = curves.run("tiny", settings, **options)
    assert list(result["arms"]) == ["control", "all", "all, not calibrated"]
    for name, arm in result["arms"].items():
        assert list(arm) == ["0", "1"]
        for run in arm.values():
            assert [point["steps"] for point in run["points"]] == [0, 2]
            assert name != "control" or run["points"][0]["loss"] == pytest.approx(result["source"]["loss"])
    plain, calibrated = (result["arms"][name]["0"]["stages"] for name in ("all, not calibrated", "all"))
    assert plain["calibrate"]["steps"] == 0 < calibrated["calibrate"]["steps"]
    text = (tmp_path / "tiny.md").read_text()
    assert "| control, 2 steps |" in text and "| all, not calibrated, 0 steps |" in text and "± " in text
    assert str(tmp_path) not in (tmp_path / "tiny.json").read_text()
    for picture in ("tiny.png", "tiny-samples.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(curves, "run_stage", None)  # nothing is left to do
    assert curves.run("tiny", settings, **options) == result


@pytest.mark.parametrize("kind", KINDS[:1], indirect=True)
def test_curves_go_on_from_the_points_that_are_done_and_show_what_there_is(settings, tmp_path, monkeypatch):
    options = {"layers": ["all"], "seeds": [0], "out": tmp_path / "tiny", "work": tmp_path / "work"}
    with pytest.raises(T5Error, match="no point was finished within 0 s"):
        curves.run("tiny", settings, **options, steps=[0, 2], seconds=0)
    first = curves.run("tiny", settings, **options, steps=[0])
    run_stage, asked = curves.run_stage, []

    def counted(name, *args, **kwargs):
        asked.append(name)
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return run_stage(name, *args, **kwargs)

    monkeypatch.setattr(curves, "run_stage", counted)
    with pytest.raises(T5Error, match="1 of 3 arms failed: all, not calibrated, seed 0: RuntimeError: out of memory"):
        curves.run("tiny", settings, **options, steps=[0, 2])
    assert asked == ["control", "finetune", "finetune"]  # what was converted, calibrated and drawn is kept
    both = read_json(tmp_path / "tiny.json")["arms"]
    assert [len(arm["0"]["points"]) for arm in both.values()] == [2, 2, 1]
    assert all(arm["0"]["points"][0] == first["arms"][name]["0"]["points"][0] for name, arm in both.items())
    for file in (tmp_path / "work").glob("control*/result.json"):
        file.unlink()
    rest = curves.run("tiny", settings, **options, steps=[0, 2], seconds=0)
    assert list(rest["arms"]) == ["all", "all, not calibrated"]
    settings["evaluate"]["sampling"]["steps"] = 3  # nothing of other settings is taken for these
    with pytest.raises(T5Error, match="no point was finished"):
        curves.run("tiny", settings, **options, steps=[0, 2], seconds=0)


@pytest.mark.parametrize("kind", KINDS[:1], indirect=True)
def test_curves_compare_models_with_settings_of_their_own_and_a_control_with_more_steps(settings, tmp_path):
    last = curves.Arm("last", ("convert.layers=all", "convert.inner=swiglu_last"))
    options = {"layers": [], "steps": [1], "seeds": [0], "out": tmp_path / "tiny", "work": tmp_path / "work"}
    result = curves.run("tiny", settings, **options, more=[last], control_steps=[1, 2])
    steps = {name: [point["steps"] for point in arm["0"]["points"]] for name, arm in result["arms"].items()}
    assert steps == {"control": [1, 2], "last": [1]}
    [job] = (tmp_path / "work").glob("last--*/data/out/tiny/finetune/t5.json")
    assert read_json(job)["t5"]["inner"] == "swiglu_last"
    run = result["arms"]["last"]["0"]
    before = run["stages"]["calibrate"]["seconds"] + run["stages"]["align"].get("seconds", 0.0)
    assert run["points"][0]["seconds_in_all"] == pytest.approx(before + run["points"][0]["seconds"])
    text = (tmp_path / "tiny.md").read_text()
    assert "| control, 1 steps |" in text and "| control, 2 steps |" in text
    ends = [result["arms"][name]["0"]["points"][-1]["fd_dinov2"] for name in ("last", "control")]
    assert f"| last | FD-DINOv2 | {100 * (ends[0] / ends[1] - 1):+.1f} |" in text


@pytest.mark.parametrize("kind", KINDS[:1], indirect=True)
@pytest.mark.parametrize(
    ("arm", "told"),
    [
        (("all", "convert.inner=mlp"), "two arms are called 'all'; the names taken are control, all"),
        (("wide", "convert.iner=mlp"), "the arm 'wide'.convert.*iner"),
        (("wide", "finetune"), "--set finetune: expected SECTION.NAME=VALUE"),
    ],
)
def test_curves_refuse_an_arm_that_cannot_be_before_anything_is_made(settings, tmp_path, arm, told):
    name, *changes = arm
    options = {"layers": ["all"], "steps": [1], "seeds": [0], "out": tmp_path / "tiny", "work": tmp_path / "work"}
    with pytest.raises(T5Error, match=told):
        curves.run("tiny", settings, **options, more=[curves.Arm(name, tuple(changes))])
    assert not list(tmp_path.iterdir())


def test_curves_refuse_a_classifier(monkeypatch):
    monkeypatch.setattr(curves, "kind", lambda settings: object)
    with pytest.raises(T5Error, match="'tiny' is a classifier, and these curves are of denoisers"):
        curves.run("tiny", {}, layers=[], steps=[], seeds=[], out=Path("out"), work=Path("work"))
