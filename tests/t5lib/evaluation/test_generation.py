"""Sampling: the same image whatever its batch, guidance as written, files that can be gone on with."""

import dataclasses

import pytest
import torch
from PIL import Image
from tiny_denoisers import CLASSES
from tiny_pipelines import SIDE, tiny_dit_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline, tiny_sd3_pipeline

from t5lib.evaluation import generation
from t5lib.evaluation.generation import GenerateConfig, classes_of, generate, read_images, sample
from t5lib.evaluation.prompts import Job
from t5lib.report import plots
from t5lib.report.sample_grid import sample_grid
from t5lib.utils.errors import T5Error

QUICK = {"steps": 3, "guidance": 3.0}


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def dit():
    return tiny_dit_pipeline()


def alike(a, b):
    """The same but for the rounding of matrix products of another batch size."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


def test_a_text_image_does_not_depend_on_its_batch(sd3):
    prompts, seeds = ["two red apples", "a cat", "snow"], [5, 6, 7]
    together = sample(sd3, prompts, seeds, GenerateConfig(batch_size=3, **QUICK))
    alone = sample(sd3, prompts, seeds, GenerateConfig(batch_size=1, **QUICK))
    assert together.shape == (3, 3, SIDE, SIDE)
    assert together.dtype == torch.uint8
    assert alike(together, alone)
    assert not alike(together[0], together[1])


@pytest.mark.parametrize("variance", [True, False], ids=["learned-variance-ddpm", "ddim"])
def test_a_class_image_does_not_depend_on_its_batch(variance):
    pipeline = tiny_dit_pipeline(learned_variance=variance)
    together = sample(pipeline, [0, 3, 4], [5, 6, 7], GenerateConfig(batch_size=3, **QUICK))
    alone = sample(pipeline, [0, 3, 4], [5, 6, 7], GenerateConfig(batch_size=2, **QUICK))
    assert together.shape == (3, 1, 8, 8)
    assert alike(together, alone)


def test_seed_and_prompt_decide_about_the_image(sd3, dit):
    for pipeline, (one, other) in ((sd3, ("a cat", "a dog")), (dit, (0, 1))):
        images = sample(pipeline, [one, one, one, other], [1, 1, 2, 1], GenerateConfig(**QUICK))
        assert alike(images[0], images[1])
        assert not alike(images[0], images[2])
        assert not alike(images[0], images[3])


def test_the_pipelines_own_call_gives_the_same_text_image(sd3):
    ours = sample(sd3, ["a cat"], [3], GenerateConfig(**QUICK))
    generator = torch.Generator().manual_seed(3)
    theirs = sd3("a cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert torch.equal(ours, (theirs * 255).round().to(torch.uint8))


@pytest.mark.parametrize("make", [tiny_flux_pipeline, tiny_qwen_image_pipeline])
def test_other_families_draw_prompts_of_any_length_too_and_follow_guidance(make):
    pipeline, prompts, seeds = make(), ["two red apples", "snow"], [5, 6]
    config = GenerateConfig(size=(16, 24), batch_size=2, **QUICK)
    together = sample(pipeline, prompts, seeds, config)
    assert together.shape == (2, 3, 16, 24)
    alone = sample(pipeline, prompts, seeds, dataclasses.replace(config, batch_size=1))
    assert alike(together, alone)
    assert not torch.equal(sample(pipeline, prompts, seeds, dataclasses.replace(config, guidance=1.0)), together)
    with pytest.raises(T5Error, match=r"size \(18, 24\): resolution 18 is not a multiple of what a patch covers .*, 4"):
        sample(pipeline, prompts, seeds, dataclasses.replace(config, size=(18, 24)))


def test_without_guidance_the_class_image_is_that_of_diffusers():
    pipeline = tiny_dit_pipeline(vae=True, learned_variance=False)
    ours = sample(pipeline, [2], [3], GenerateConfig(steps=3, guidance=1.0))
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline([2], guidance_scale=1.0, num_inference_steps=3, generator=generator, output_type="pt").images
    assert ours.shape == (1, 3, SIDE, SIDE)
    assert alike(ours, (theirs * 255).round().to(torch.uint8))


def test_guidance_is_away_from_the_class_after_the_last(dit):
    seen = {}

    def denoiser(latents, timestep, class_labels):
        seen["labels"] = class_labels.tolist()
        noise = (class_labels + 1.0)[:, None, None, None].expand(-1, 2, 8, 8).clone()
        noise[:, 1] = class_labels[:, None, None]  # what the variance follows from
        return type("Output", (), {"sample": noise})

    denoiser.dtype = torch.float32
    labels = torch.tensor([1, 2])
    out = generation._guided(denoiser, torch.zeros(2, 1, 8, 8), torch.tensor(9), labels, CLASSES, 3.0)
    assert seen["labels"] == [1, 2, CLASSES, CLASSES]
    free, given = CLASSES + 1.0, torch.tensor([2.0, 3.0])
    assert torch.equal(out[:, 0, 0, 0], free + 3 * (given - free))
    assert torch.equal(out[:, 1, 0, 0], labels.float())


def test_size_of_text_images_is_free(sd3):
    wide = sample(sd3, ["a cat"], [0], GenerateConfig(size=(8, 24), max_sequence_length=16, **QUICK))
    assert wide.shape == (1, 3, 8, 24)


def test_what_kind_a_pipeline_is(sd3, dit):
    assert classes_of(sd3) is None
    assert classes_of(dit) == CLASSES


@pytest.mark.parametrize("wrong", [-1, CLASSES, "cat"])
def test_classes_that_are_none(dit, wrong):
    with pytest.raises(T5Error, match=f"numbers from 0 to {CLASSES - 1}"):
        sample(dit, [0, wrong], [0, 1], GenerateConfig(**QUICK))


def test_a_scheduler_that_would_leave_noise_is_given_steps_that_suit_or_refused(dit):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    trailing = DDIMScheduler(timestep_spacing="trailing")
    assert sample(_with(dit, trailing), [0], [0], GenerateConfig(steps=2)).shape[0] == 1
    with pytest.raises(T5Error, match=r"steps 3: .* divide its 1000, as 4 do"):
        sample(_with(dit, trailing), [0], [0], GenerateConfig(steps=3))
    for other in (DDIMScheduler(), DPMSolverMultistepScheduler(timestep_spacing="trailing")):
        sample(_with(dit, other), [0], [0], GenerateConfig(steps=3))


def _with(dit, scheduler):
    return type(dit)(**{**dit.components, "scheduler": scheduler})


def test_what_does_not_suit_the_pipeline_is_refused(sd3, dit):
    with pytest.raises(T5Error, match="draws from text"):
        sample(sd3, [3], [0], GenerateConfig(**QUICK))
    with pytest.raises(T5Error, match=r"makes images of \(8, 8\)"):
        sample(dit, [0], [0], GenerateConfig(size=(16, 16), **QUICK))
    with pytest.raises(T5Error, match=r"size \(15, 16\): resolution 15 is not a multiple of .*, 4; the nearest is 16"):
        sample(sd3, ["a"], [0], GenerateConfig(size=(15, 16), **QUICK))
    with pytest.raises(T5Error, match=r"size \(16, 4096\): resolution 4096 gives .*; measure up to \d+ pixels"):
        sample(sd3, ["a"], [0], GenerateConfig(size=(16, 4096), **QUICK))
    with pytest.raises(T5Error, match="max_sequence_length is 600; expected at most 512"):
        sample(sd3, ["a"], [0], GenerateConfig(max_sequence_length=600, **QUICK))
    with pytest.raises(T5Error, match="a seed for each prompt"):
        sample(dit, [0], [0, 1], GenerateConfig(**QUICK))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"guidance": -1.0}, {"size": (0, 8)}])
def test_settings_out_of_range(wrong):
    with pytest.raises(T5Error, match="expected"):
        GenerateConfig(**wrong)


def plan(folder, count=5):
    return [Job(path=folder / f"{index}.png", prompt=index % CLASSES, seeds=(index,)) for index in range(count)]


def test_an_interrupted_run_goes_on_and_gives_the_same_images(dit, tmp_path, monkeypatch):
    config = GenerateConfig(batch_size=2, **QUICK)
    generate(dit, plan(tmp_path / "whole"), config, model="m")
    jobs = plan(tmp_path / "cut")
    calls, real = [], generation._from_classes

    def crash(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generation, "_from_classes", crash)
    with pytest.raises(KeyboardInterrupt):
        generate(dit, jobs, config, model="m")
    assert [job.path.exists() for job in jobs] == [True, True, False, False, False]
    jobs[1].path.write_bytes(jobs[1].path.read_bytes()[:-20])  # a disk that filled up
    assert generate(dit, jobs, config, model="m") == 4
    assert generate(dit, jobs, config, model="m") == 0
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [f"{index}.png" for index in range(5)]
    for path in (tmp_path / "whole").iterdir():
        assert alike(*(read_images([folder / path.name], channels=1) for folder in (path.parent, tmp_path / "cut")))


@pytest.mark.parametrize(("model", "told"), [("control", "control"), ("/home/me/sd35-t5", "sd35-t5")])
def test_progress_tells_which_model_draws(dit, tmp_path, capsys, model, told):
    generate(dit, plan(tmp_path, 2), GenerateConfig(**QUICK), model=model)
    assert f"generate {told}: 2/2" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("other", [{"model": "n"}, {"config": {"steps": 4, "guidance": 3.0}}])
def test_images_of_other_settings_are_not_mixed_in(dit, tmp_path, other):
    generate(dit, plan(tmp_path, 1), GenerateConfig(**QUICK), model="m")
    with pytest.raises(T5Error, match="was made with"):
        generate(dit, plan(tmp_path, 1), GenerateConfig(**other.get("config", QUICK)), model=other.get("model", "m"))
    larger = GenerateConfig(batch_size=7, **QUICK)
    assert generate(dit, plan(tmp_path, 1), larger, model="m") == 0  # that decides about nothing


def test_several_seeds_make_one_picture_row_by_row(dit, tmp_path):
    job = Job(path=tmp_path / "four.png", prompt=1, seeds=(1, 2, 3, 4))
    generate(dit, [job, *plan(tmp_path, 2)], GenerateConfig(batch_size=3, **QUICK), model="m")
    four = read_images([job.path], channels=1)[0]
    one = sample(dit, [1] * 4, job.seeds, GenerateConfig(**QUICK))
    assert four.shape == (1, 16, 16)
    corners = [four[:, :8, :8], four[:, :8, 8:], four[:, 8:, :8], four[:, 8:, 8:]]
    assert all(alike(corner, image) for corner, image in zip(corners, one, strict=True))


def test_images_of_two_sizes_are_not_read_together(tmp_path):
    for index, side in enumerate((4, 6)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{index}.png")
    with pytest.raises(T5Error, match="different sizes"):
        read_images(sorted(tmp_path.iterdir()))


def test_a_grid_has_a_picture_for_every_model_and_prompt(tmp_path):
    models = {name: torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8) for name in ("softmax", "T5")}
    figure = sample_grid(models, ["a cat", "two dogs on a very long road to nowhere at all", "snow"])
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 6
    assert (panels[1].images[0].get_array() == models["T5"][0].movedim(0, -1).numpy()).all()
    plots.save(figure, tmp_path / "grid.png")
    grey = sample_grid({name: images[:, :1] for name, images in models.items()}, ["1", "2", "3"])
    plots.save(grey, tmp_path / "grey.png")
