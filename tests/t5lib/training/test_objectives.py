"""Latents are noised, and losses weighed, as the papers and the models' own schedulers have it."""

import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_denoisers import POOLED, TEXT, dit_batch, sd3_batch, tiny_dit, tiny_sd3
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from t5lib.data.batches import seeded
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noising_of
from t5lib.utils.errors import T5Error


def noised(objective, size: int = 4, seed: int = 0):
    return objective.noised(dit_batch(0, size), seeded(seed))


def at_step(step: int, size: int = 2):
    """A diffusion example all of whose images are at `step`."""
    given = noised(NoiseAndVariance(), size)
    level = torch.full((size,), step)
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    noisy = schedule.add_noise(given.clean, given.noise, level)
    return dataclasses.replace(given, inputs=given.inputs | {"hidden_states": noisy}, level=level)


# rectified flow


def test_flow_input_is_the_schedulers_own_noised_sample_and_timestep():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = noised(RectifiedFlow(shift=3.0), 64)
    timestep = given.inputs["timestep"]
    expected = scheduler.scale_noise(given.clean, timestep, given.noise)
    torch.testing.assert_close(given.inputs["hidden_states"], expected)
    torch.testing.assert_close(given.level * 1000, timestep)
    assert set(timestep.tolist()) <= set(scheduler.timesteps.tolist())


def test_flow_levels_are_logit_normal_and_shifted():
    level = noised(RectifiedFlow(shift=3.0), 20000).level.double()
    drawn = 1 - level / (3 - 2 * level)  # the shift undone; indices run from noise to image
    logits = drawn.clamp(1e-4, 1 - 1e-4).logit()
    assert logits.mean().item() == pytest.approx(0.0, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_guidance_is_told_of_every_image_where_the_model_takes_it():
    given = noised(RectifiedFlow(guidance=3.5), 3).inputs
    assert given["guidance"].tolist() == [3.5, 3.5, 3.5] and "guidance" not in noised(RectifiedFlow()).inputs


@pytest.mark.parametrize(("kind", "expected"), [("exponential", math.exp(1.15)), ("linear", 1.15)])
def test_a_scheduler_that_shifts_by_size_gives_the_shift_of_its_largest_images(kind, expected):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15, time_shift_type=kind)
    noising = noising_of(scheduler)
    assert noising.shift == pytest.approx(expected)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5], mu=1.15)
    levels = [0.75 * expected / (1 + (expected - 1) * 0.75), 0.5 * expected / (1 + (expected - 1) * 0.5)]
    assert scheduler.sigmas[1:3].tolist() == pytest.approx(levels, rel=1e-5)
    assert noising_of(scheduler, shift=2.0).shift == 2.0


def test_other_densities_are_drawn_when_asked_for():
    uniform = noised(RectifiedFlow(shift=1.0, weighting="none"), 20000).level
    assert torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    skewed = noised(RectifiedFlow(shift=1.0, logit_mean=1.0), 20000).level
    assert skewed.median().item() == pytest.approx(1 - torch.tensor(1.0).sigmoid().item(), abs=0.02)


def test_true_velocity_has_no_loss_and_the_loss_is_its_squared_error():
    objective = RectifiedFlow()
    given = noised(objective)
    velocity = given.noise - given.clean
    assert objective.loss(velocity, given).item() == 0
    assert objective.loss(velocity + 0.5, given).item() == pytest.approx(0.25, rel=1e-5)
    step = given.inputs["hidden_states"] - given.level[:, None, None, None] * velocity
    torch.testing.assert_close(step, given.clean)  # following the velocity from sigma to 0 ends at the image


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("none", lambda s: torch.ones_like(s)),
        ("sigma_sqrt", lambda s: s**-2),
        ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
    ],
)
def test_loss_is_weighed_image_by_image(weighting, weight):
    objective = RectifiedFlow(weighting=weighting)
    given = noised(objective)
    off = torch.arange(1.0, 5.0)[:, None, None, None]
    expected = (weight(given.level) * torch.arange(1.0, 5.0) ** 2).mean().item()
    assert objective.loss(given.noise - given.clean + off, given).item() == pytest.approx(expected, rel=1e-4)


# noise and variance


def test_diffusion_input_is_the_schedulers_own_noised_sample():
    given = noised(NoiseAndVariance(), 8)
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[given.level][:, None, None, None]
    expected = kept.sqrt() * given.clean + (1 - kept).sqrt() * given.noise
    torch.testing.assert_close(given.inputs["hidden_states"], expected.float())
    assert torch.equal(given.inputs["timestep"], given.level) and given.level.dtype == torch.int64


def test_steps_are_drawn_uniformly_to_both_ends():
    level = noised(NoiseAndVariance(), 20000).level
    assert level.min() == 0 and level.max() == 999
    assert level.double().mean().item() == pytest.approx(499.5, abs=10)


def test_true_noise_has_no_loss_with_and_without_the_true_variance():
    objective, given = NoiseAndVariance(), at_step(500)
    least = torch.full_like(given.noise, -1.0)  # the true step's variance is the least possible
    assert objective.loss(given.noise, given).item() == 0
    assert objective.loss(torch.cat([given.noise, least], dim=1), given).item() == pytest.approx(0, abs=1e-6)
    assert objective.loss(given.noise + 0.5, given).item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("step", [1, 2, 100, 999])
def test_bound_is_the_divergence_between_the_true_and_the_given_step(step):
    objective, given = NoiseAndVariance(), at_step(step)
    generator = torch.Generator().manual_seed(1)
    predicted = given.noise + 0.3 * torch.randn(given.noise.shape, generator=generator)
    variance = torch.rand(given.noise.shape, generator=generator) * 2 - 1
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas, kept = 1 - betas, (1 - betas).cumprod(0)
    noisy = given.inputs["hidden_states"].double()
    # Bayes: x_{t-1} given x_t and x_0, from the two normal distributions it is in
    precision = alphas[step] / betas[step] + 1 / (1 - kept[step - 1])

    def mean(start):
        return (alphas[step].sqrt() / betas[step] * noisy + kept[step - 1].sqrt() / (1 - kept[step - 1]) * start) / (
            precision
        )

    start = (noisy - (1 - kept[step]).sqrt() * predicted) / kept[step].sqrt()
    log_variance = (1 - variance) / 2 * precision.reciprocal().log() + (1 + variance) / 2 * betas[step].log()
    true = Normal(mean(given.clean.double()), precision.rsqrt())
    bits = kl_divergence(true, Normal(mean(start), (0.5 * log_variance).exp())).mean() / math.log(2)
    expected = F.mse_loss(predicted, given.noise) + bits
    loss = objective.loss(torch.cat([predicted, variance], dim=1), given)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)


def test_last_step_is_scored_by_the_likelihood_of_8_bit_values():
    """All 256 values' likelihoods add up to one, and the loss holds minus the logarithm of the right one."""
    objective, given = NoiseAndVariance(), at_step(0, size=1)
    values = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    given = dataclasses.replace(given, clean=values, noise=torch.zeros_like(values))
    kept = 1 - 1e-4
    noisy = torch.full_like(values, 0.3)
    given = dataclasses.replace(given, inputs={"hidden_states": noisy})
    bits = objective._bound(torch.zeros_like(values), torch.full_like(values, 1.0), given)
    likelihoods = 2.0**-bits
    assert likelihoods.sum().item() == pytest.approx(1.0, abs=1e-4)
    spread = Normal(noisy[0, 0, 0, 0].double() / kept**0.5, 1e-4**0.5)
    expected = spread.cdf(values.double() + 1 / 255) - spread.cdf(values.double() - 1 / 255)
    torch.testing.assert_close(likelihoods, expected.float(), rtol=1e-2, atol=1e-4)


def test_bound_teaches_the_variance_and_not_the_noise():
    objective, given = NoiseAndVariance(), noised(NoiseAndVariance())
    predicted = (given.noise + 0.1).requires_grad_()
    variance = torch.zeros_like(given.noise).requires_grad_()
    objective.loss(torch.cat([predicted, variance], dim=1), given).backward()
    torch.testing.assert_close(predicted.grad, torch.full_like(predicted, 0.2 / predicted.numel()))
    assert variance.grad.abs().min() > 0


def test_loss_at_the_last_step_stays_finite_for_latents_beyond_the_range_of_images():
    objective, given = NoiseAndVariance(), at_step(0)
    given = dataclasses.replace(given, clean=given.clean * 10)
    output = torch.zeros(2, 8, 8, 8, requires_grad=True)
    loss = objective.loss(output, given)
    loss.backward()
    assert loss.isfinite() and output.grad.isfinite().all()


# both


@pytest.mark.parametrize("objective", [RectifiedFlow(), NoiseAndVariance()], ids=["flow", "diffusion"])
def test_inputs_fit_the_models_and_carry_the_condition(objective):
    sd3, dit = (objective.noised(batch(0), seeded(0)) for batch in (sd3_batch, dit_batch))
    assert sd3.inputs["encoder_hidden_states"].shape == (4, TEXT, 6)
    assert sd3.inputs["pooled_projections"].shape == (4, POOLED)
    assert torch.equal(dit.inputs["class_labels"], dit_batch(0)["labels"])
    with torch.no_grad():
        for model, given in ((tiny_sd3(), sd3), (tiny_dit(learned_variance=False), dit)):
            output = model(**given.inputs, return_dict=False)[0]
            assert objective.loss(output, given).isfinite()


@pytest.mark.parametrize("objective", [RectifiedFlow(), NoiseAndVariance()], ids=["flow", "diffusion"])
def test_same_generator_gives_the_same_noise_and_another_one_gives_other_noise(objective):
    one, same, other = (noised(objective, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.noise, same.noise) and torch.equal(one.level, same.level)
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.level, other.level)


def test_halves_are_widened():
    batch = {name: tensor.half() for name, tensor in sd3_batch(0).items()}
    given = RectifiedFlow().noised(batch, seeded(0))
    assert {tensor.dtype for tensor in given.inputs.values()} == {torch.float32}


def test_seeds_tell_combinations_of_numbers_apart():
    firsts = {torch.rand(1, generator=seeded(*numbers)).item() for numbers in ((0, 1), (1, 0), (0, 0, 1), (2**40, 0))}
    assert len(firsts) == 4


def test_objective_follows_from_the_pipelines_scheduler():
    assert noising_of(FlowMatchEulerDiscreteScheduler(shift=2.0), weighting="mode") == RectifiedFlow(
        shift=2.0, weighting="mode"
    )
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler):
        scheduler = kind(num_train_timesteps=500, beta_start=1e-3, beta_end=0.03, beta_schedule="linear")
        assert noising_of(scheduler) == NoiseAndVariance(steps=500, beta_start=1e-3, beta_end=0.03)
    with pytest.raises(T5Error, match=r"DDPMScheduler has .*\('linear', 'v_prediction'\)"):
        noising_of(DDPMScheduler(prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.zeros(1)}, r"'latents' \(B, C, h, w\), got None among \['labels'\]"),
        ({"latents": torch.zeros(4, 8, 8)}, r"got \(4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "must hold 'labels', or 'prompt_embeds' with 'pooled'"),
        ({"latents": torch.zeros(1, 4, 8, 8), "pooled": torch.zeros(1, 2)}, r"got \['latents', 'pooled'\]"),
    ],
    ids=["no latents", "one image", "no condition", "half a condition"],
)
def test_batches_that_cannot_be_used_are_refused(batch, message):
    with pytest.raises(T5Error, match=message):
        RectifiedFlow().noised(batch, seeded(0))


def test_outputs_of_another_kind_of_model_are_refused():
    with pytest.raises(T5Error, match=r"gives \(4, 4, 8, 8\), this one gave \(4, 8, 8, 8\)"):
        RectifiedFlow().loss(torch.zeros(4, 8, 8, 8), noised(RectifiedFlow()))
    with pytest.raises(T5Error, match=r"gave \(4, 3, 8, 8\)"):
        NoiseAndVariance().loss(torch.zeros(4, 3, 8, 8), noised(NoiseAndVariance()))


@pytest.mark.parametrize("setting", [{"weighting": "logit"}, {"shift": 0.0}, {"logit_std": 0.0}], ids=str)
def test_flow_settings_out_of_range_are_refused(setting):
    with pytest.raises(T5Error, match=next(iter(setting))):
        RectifiedFlow(**setting)


@pytest.mark.parametrize("setting", [{"steps": 1}, {"beta_start": 0.0}, {"beta_end": 1.0}], ids=str)
def test_diffusion_settings_out_of_range_are_refused(setting):
    with pytest.raises(T5Error, match=next(iter(setting))):
        NoiseAndVariance(**setting)
