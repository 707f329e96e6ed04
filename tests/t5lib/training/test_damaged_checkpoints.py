"""A damaged checkpoint is never taken for a whole one, and a fit never goes on under another recipe or other code."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny import random_images, tiny_vit
from training_job import ALL_ON, STEPS, batches, converted, run, same, state

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.training import checkpoints
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.classifier import Classification
from t5lib.training.trainer import Trainer
from t5lib.utils.errors import T5Error


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 3 and 6, as a run that was killed after them leaves it."""
    folder = tmp_path_factory.mktemp("saved")
    run(converted(), dataclasses.replace(ALL_ON, checkpoints_kept=3), resume_dir=folder)
    shutil.rmtree(folder / f"step-{STEPS:07d}")
    return folder


def copied(saved: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(saved, to))


def flipped(content: bytes, at: float) -> bytes:
    place = int(at * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ (1 << (place % 7))]) + content[place + 1 :]


DAMAGES = {
    **{f"bit at {at}": lambda content, at=at: flipped(content, at) for at in (0.0, 0.02, 0.3, 0.5, 0.77, 0.98, 1.0)},
    **{f"cut at {at}": lambda content, at=at: content[: int(at * len(content))] for at in (0.0, 0.5, 0.99)},
    "longer": lambda content: content + b"\0",
    "missing": None,
}


def damage(path: Path, how: str) -> None:
    change = DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


def test_none_of_72_damages_is_taken_for_a_whole_checkpoint(saved, tmp_path, caplog):
    trainer = Trainer(converted(), Classification(ALL_ON, 7), ALL_ON, STEPS)
    files = sorted(path.name for path in (saved / "step-0000006").iterdir())
    assert files == [
        "done.json", "ema.safetensors", "files.json", "made_by.json", "model.safetensors", "optimizer.pt",
    ]  # fmt: skip
    older = copied(saved, tmp_path / "older")
    shutil.rmtree(older / "step-0000006")
    trainer.load(older)
    expected = state(trainer.plain)
    tried = 0
    for file in files:
        for how in DAMAGES:
            folder = copied(saved, tmp_path / "x")
            damage(folder / "step-0000006" / file, how)
            caplog.clear()
            with torch.no_grad():
                trainer.plain.head.weight.zero_()
            trainer.load(folder)
            assert trainer.done.step == 3 and same(state(trainer.plain), expected), (file, how)
            assert f"{folder}/step-0000006 is damaged" in caplog.text and "resuming from" in caplog.text
            tried += 1
    trainer.close()
    assert tried == 72


@pytest.mark.parametrize("files", ["calibrate.pt", "made_by.json", "files.json"])
def test_a_damaged_checkpoint_of_a_calibration_is_named_and_the_older_one_taken(files, tmp_path, caplog):
    config = CalibrateConfig(steps=6, batch_size=4, pool=1, reuse=1, warmup=0, checkpoint_every=2, lr_inherited=0.0)
    teacher, whole = tiny_vit("average_pool"), converted()
    options = {"teacher": teacher, "batches": batches, "config": config}
    t5lib.calibrate(whole, resume_dir=tmp_path / "saved", **options)
    for how in DAMAGES:
        folder, model, steps = copied(tmp_path / "saved", tmp_path / "x"), converted(), []
        damage(folder / "step-0000006" / files, how)
        caplog.clear()
        t5lib.calibrate(model, resume_dir=folder, log=lambda _, step, steps=steps: steps.append(step), **options)
        assert "step-0000006 is damaged" in caplog.text and steps == [6]  # told at the end alone
        assert same(state(model), state(whole)), how


def test_where_every_checkpoint_is_damaged_it_begins_anew_and_says_so(saved, tmp_path, caplog):
    folder, steps = copied(saved, tmp_path / "x"), []
    (folder / "step-0000003/model.safetensors").unlink()
    (folder / "step-0000006/files.json").write_text("{}")
    run(converted(), ALL_ON, resume_dir=folder, log=lambda _, step: steps.append(step))
    assert steps[0] == 1 and f"{folder} holds no other checkpoint; starting over" in caplog.text


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"lr": 2e-3}, STEPS, r"lr was 0\.001, is 0\.002"),
        ({"trainable": "new"}, STEPS, r"trainable was all, is new; trained_weights was \d+, is \d+"),
        ({}, STEPS + 1, "steps was 8, is 9"),
    ],
)
def test_a_fit_does_not_go_on_under_another_recipe(changes, steps, message, saved, tmp_path):
    folder = copied(saved, tmp_path / "x")
    with pytest.raises(T5Error, match=rf"step-0000006 .* other settings \({message}\).*delete .*/x to start over"):
        run(converted(), dataclasses.replace(ALL_ON, **changes), steps=steps, resume_dir=folder)


@pytest.mark.parametrize("fit", [t5lib.calibrate, t5lib.align])
def test_a_fit_does_not_go_on_for_another_teacher_or_other_layers(fit, tmp_path):
    configs = {t5lib.calibrate: CalibrateConfig, t5lib.align: t5lib.AlignConfig}
    config = configs[fit](steps=4, batch_size=2, checkpoint_every=1)
    batches = [random_images(2, seed=number) for number in range(6)]

    def go(seed: int, **layer) -> None:
        teacher = tiny_vit(seed=seed)
        model = t5lib.convert(teacher, TTTConfig(**layer))
        fit(model, teacher=teacher, batches=batches, config=config, resume_dir=tmp_path / "fit")

    go(0)
    for seed, layer, message in ((1, {}, "teacher was"), (0, {"key_norm": "layer"}, "key_norm was instance, is layer")):
        with pytest.raises(T5Error, match=message):
            go(seed, **layer)


def test_a_fit_does_not_go_on_with_other_code_and_names_the_files(saved, tmp_path, monkeypatch):
    assert {"t5lib/training/loop.py", "t5lib/conversion.py", "t5kernels/ttt/reference.py"} <= checkpoints.code().keys()
    changed = checkpoints.code() | {"t5lib/training/loop.py": "0" * 64}
    monkeypatch.setattr(checkpoints, "code", lambda: changed)
    with pytest.raises(T5Error, match=r"made with other settings \(t5lib/training/loop\.py\)"):
        run(converted(), ALL_ON, resume_dir=copied(saved, tmp_path / "x"))


def test_what_only_costs_may_change_between_the_runs(saved, tmp_path):
    steps = []
    config = dataclasses.replace(ALL_ON, checkpoint_every=7, checkpoints_kept=1, gradient_checkpointing=True)
    run(converted(), config, resume_dir=copied(saved, tmp_path / "x"), log=lambda _, step: steps.append(step))
    assert steps == [7, 8]


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_refuse_other_maker", lambda *_: None)
    with pytest.raises(T5Error, match="is another model's"):
        run(converted(inner="two_layer"), ALL_ON, resume_dir=copied(saved, tmp_path / "x"))


def test_too_little_room_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    for fit in (
        lambda: run(converted(), ALL_ON, resume_dir=tmp_path),
        lambda: t5lib.calibrate(converted(), teacher=tiny_vit("average_pool"), batches=batches, resume_dir=tmp_path),
    ):
        with pytest.raises(T5Error, match=r"0\.0 GB free; checkpoints need .*: 2 of .*lower checkpoints_kept"):
            fit()


def test_a_file_that_cannot_be_read_is_told_and_nothing_removed(saved, tmp_path, monkeypatch):
    folder = copied(saved, tmp_path / "x")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints, "sha256", denied)
    trainer_code = checkpoints.code  # as it was seen when the process began
    with pytest.raises(T5Error, match=r"cannot be read \(Permission denied\)"):
        checkpoints.newest(folder, {"code": trainer_code()})
    assert len(list(folder.iterdir())) == 2
