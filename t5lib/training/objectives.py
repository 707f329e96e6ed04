"""How latents are noised, and the loss of what a denoiser says about them.

Shapes: B images, C latent channels of h × w, L text tokens of D channels, P channels of the pooled text. A batch is a
dictionary with "latents" (B, C, h, w) and what the model is conditioned on: "labels" (B,), or "prompt_embeds" (B, L, D)
with "pooled" (B, P) or "prompt_mask" (B, L), where the model takes them. Captions and labels are dropped, for guidance,
where batches are made.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from diffusers import ConfigMixin, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from pydantic import Field
from torch import Tensor

from t5lib.data.batches import Batches, open_batches, seeded
from t5lib.families.inputs import Inputs, placed
from t5lib.utils.config import Positive, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.processes import WHOLE, Part

Batch = dict[str, Tensor]
LOOKED_AT = 2  # what tells the noise of a calibration, or of a look at a model, from that of a training
CONDITIONS = {
    "labels": "class_labels",
    "prompt_embeds": "encoder_hidden_states",
    "pooled": "pooled_projections",
    "prompt_mask": "encoder_attention_mask",
}


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Noised latents and what is known of them.

    Attributes:
        inputs: keyword arguments of the model, which is to be called with return_dict=False.
        clean, noise: (B, C, h, w).
        level: (B,) how much noise: sigma of a rectified flow, or the step of a diffusion.
    """

    inputs: dict[str, Tensor]
    clean: Tensor
    noise: Tensor
    level: Tensor

    def to(self, device: torch.device) -> "Noised":
        return Noised(inputs=placed(self.inputs, device), **placed(self._known(), device))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**self.inputs, **self._known()}

    def _known(self) -> dict[str, Tensor]:
        return {"clean": self.clean, "noise": self.noise, "level": self.level}


@settings
class RectifiedFlow:
    """x_t = (1 - sigma) x_0 + sigma ε; the model predicts the velocity ε - x_0; weighted squared error.

    Attributes:
        shift: of the sigmas towards noise, as the model's own scheduler has it (3 for SD3 and SD3.5).
        weighting: density of the noise levels and weight of the loss, by diffusers' names: "logit_normal" (SD3's) and
            "mode" draw other levels and weigh them alike; "sigma_sqrt" and "cosmap" draw uniformly and weigh.
        logit_mean, logit_std: of "logit_normal"; mode_scale: of "mode".
        guidance: what a model that was distilled from guidance (Flux.1-dev) is told of how strongly to follow its
            prompt, as the pipeline's guidance_scale; None where the model takes none.

    Source: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206), section 3.1.
    """

    shift: Annotated[float, Field(ge=0.01, le=100)] = 3.0
    weighting: Literal["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"] = "logit_normal"
    logit_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    logit_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29  # beyond, levels would leave 0 to 1
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None

    def noised(self, batch: Batch, generator: torch.Generator, part: Part = WHOLE) -> Noised:
        """Draw a noise level for every image, and noise, from a CPU generator: the same numbers on any device, and for
        an image of a batch of which a process has a part alone."""
        clean, noise = _clean_and_noise(batch, generator, part)
        density = (self.weighting, len(clean) * part.rows, self.logit_mean, self.logit_std, self.mode_scale)
        drawn = compute_density_for_timestep_sampling(*density, generator=generator)[part.row :: part.rows]
        scheduler = _flow(self.shift)
        indices = (drawn * len(scheduler.sigmas)).long().clamp_max(len(scheduler.sigmas) - 1)
        sigma = scheduler.sigmas[indices]
        noisy = torch.lerp(clean, noise, _per_image(sigma))
        inputs = {"hidden_states": noisy, "timestep": scheduler.timesteps[indices], **_conditions(batch)}
        if self.guidance is not None:
            inputs["guidance"] = torch.full((len(clean),), self.guidance)
        return Noised(inputs=inputs, clean=clean, noise=noise, level=sigma)

    def prediction(self, output: Tensor, noised: Noised) -> Tensor:
        """The velocity (B, C, h, w) in a model's output."""
        if output.shape != noised.clean.shape:
            raise T5Error(f"a flow model gives {tuple(noised.clean.shape)}, this one gave {tuple(output.shape)}")
        return output.float()

    def loss(self, output: Tensor, noised: Noised) -> Tensor:
        """Mean over images and values, a scalar."""
        error = self.prediction(output, noised) - (noised.noise - noised.clean)
        weight = compute_loss_weighting_for_sd3(self.weighting, noised.level)
        return (weight * error.square().mean(dim=(1, 2, 3))).mean()


@settings
class NoiseAndVariance:
    """DiT's: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε; squared error of the predicted ε, and a bound for a learned variance.

    A model with 2·C output channels interpolates the log-variance of a denoising step between its least and largest
    possible value with the second half. What that is worth is the variational bound's term of the step, in bits a
    value; its gradient does not reach the predicted ε. A model with C channels learns from the squared error alone.

    Attributes:
        steps, beta_start, beta_end: linear noise schedule, as the model's own scheduler has it.

    Source: "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), section 3.1, whose weight of the
    bound, 0.001 times the number of steps, is 1 here; "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
    """

    steps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Positive = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02

    def __post_init__(self):
        if self.beta_start > self.beta_end:
            raise T5Error(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}; expected beta_start <= beta_end, such "
                "as 1.0e-4 and 0.02"
            )

    def noised(self, batch: Batch, generator: torch.Generator, part: Part = WHOLE) -> Noised:
        """Draw a step for every image, and noise, from a CPU generator: the same numbers on any device, and for an
        image of a batch of which a process has a part alone."""
        clean, noise = _clean_and_noise(batch, generator, part)
        step = torch.randint(self.steps, (len(clean) * part.rows,), generator=generator)[part.row :: part.rows]
        scheduler = self._scheduler()
        noisy = scheduler.add_noise(clean, noise, step)  # type: ignore[arg-type]  # int32, says diffusers; int64 will do
        inputs = {"hidden_states": noisy, "timestep": step, **_conditions(batch)}
        return Noised(inputs=inputs, clean=clean, noise=noise, level=step)

    def prediction(self, output: Tensor, noised: Noised) -> Tensor:
        """The noise (B, C, h, w) in a model's output."""
        return self._split(output, noised)[0]

    def loss(self, output: Tensor, noised: Noised) -> Tensor:
        """Mean over images and values, a scalar."""
        predicted, fraction = self._split(output, noised)
        loss = (predicted - noised.noise).square().mean()
        if fraction is None:
            return loss
        return loss + 1e-3 * self.steps * self._bound(predicted.detach(), fraction, noised).mean()

    def _split(self, output: Tensor, noised: Noised) -> tuple[Tensor, Tensor | None]:
        """Predicted noise and, if the model learns it, where the log-variance lies: 0 for least, 1 for largest."""
        channels = noised.clean.shape[1]
        if output.shape[2:] != noised.clean.shape[2:] or output.shape[1] not in (channels, 2 * channels):
            raise T5Error(
                f"a model that denoises {tuple(noised.clean.shape)} gives as many channels or twice as many, this one "
                f"gave {tuple(output.shape)}"
            )
        predicted, fraction = output.float()[:, :channels], output.float()[:, channels:]
        return predicted, (fraction + 1) / 2 if fraction.shape[1] else None

    def _bound(self, predicted: Tensor, fraction: Tensor, noised: Noised) -> Tensor:
        """The step's term of the variational bound, in bits, (B, C, h, w)."""
        noisy = noised.inputs["hidden_states"]
        tables = _tables(self, noisy.device)
        table = {name: _per_image(row[noised.level]) for name, row in tables.items()}
        start = (noisy - table["noise"] * predicted) / table["signal"]
        true, given = (table["from_start"] * x + table["from_noisy"] * noisy for x in (noised.clean, start))
        log_variance = torch.lerp(table["log_least"], table["log_largest"], fraction)
        kl = 0.5 * (
            log_variance
            - table["log_least"]
            - 1
            + (table["log_least"] - log_variance).exp()
            + (true - given).square() * (-log_variance).exp()
        )
        last = -_log_likelihood(noised.clean, given, (0.5 * log_variance).exp())
        return torch.where(_per_image(noised.level == 0), last, kl) / math.log(2)

    def _scheduler(self) -> DDPMScheduler:
        return _diffusion(self.steps, self.beta_start, self.beta_end)


Noising = RectifiedFlow | NoiseAndVariance


def noised_inputs(batches: Batches, noising: Noising, seed: int) -> Batches:
    """What a denoiser is called with for batches of latents, at levels drawn as in training: for calibration.

    Args:
        batches: latents and conditions; see t5lib.data.batches.
        seed: of the noise, which follows from it and the batch's number.
    """

    def from_batch(start: int, part: Part = WHOLE) -> Iterator[Inputs]:
        for number, batch in zip(part.numbers(start), open_batches(batches, start, part), strict=False):
            yield noised_batch(batch, noising, seed, number, part)

    return from_batch


def noised_batch(batch: Batch, noising: Noising, seed: int, number: int = 0, part: Part = WHOLE) -> Inputs:
    """What a denoiser is called with for a batch of latents, each at one level: to look at a model."""
    return noising.noised(batch, seeded(seed, LOOKED_AT, number), part).inputs


def noising_of(scheduler: ConfigMixin, **changes: Any) -> Noising:
    """How latents are noised where a pipeline has this scheduler, with its noise schedule.

    A scheduler that shifts by the size of the image (Flux.1-dev, Qwen-Image) gives the shift of its largest.

    Args:
        changes: other settings, such as RectifiedFlow's weighting.

    Raises:
        T5Error: neither a flow nor a linear noise schedule with predicted noise.
    """
    settings = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(**{"shift": _shift(settings)} | changes)
    found = (settings.get("beta_schedule"), settings.get("prediction_type"))
    if found != ("linear", "epsilon"):
        raise T5Error(
            f"{type(scheduler).__name__} has beta_schedule and prediction_type {found}; expected a "
            "FlowMatchEulerDiscreteScheduler, or ('linear', 'epsilon') as DiT has"
        )
    most = settings["num_train_timesteps"]
    if changes.get("steps", 0) > most:
        raise T5Error(f"steps is {changes['steps']}, but the model learned {most} steps; expected at most that many")
    schedule = {name: settings[name] for name in ("beta_start", "beta_end")}
    return NoiseAndVariance(**{"steps": most} | schedule | changes)


def _shift(settings: dict[str, Any]) -> float:
    """Of a FlowMatchEulerDiscreteScheduler's sigmas."""
    if not settings["use_dynamic_shifting"]:
        return settings["shift"]
    return math.exp(settings["max_shift"]) if settings["time_shift_type"] == "exponential" else settings["max_shift"]


def _clean_and_noise(batch: Batch, generator: torch.Generator, part: Part) -> tuple[Tensor, Tensor]:
    clean = batch.get("latents")
    if clean is None or clean.ndim != 4:
        shape = None if clean is None else tuple(clean.shape)
        raise T5Error(f"a batch must hold 'latents' (B, C, h, w), got {shape} among {sorted(batch)}")
    clean = clean.cpu().float()
    noise = torch.randn(len(clean) * part.rows, *clean.shape[1:], generator=generator)
    return clean, noise[part.row :: part.rows]


def _conditions(batch: Batch) -> dict[str, Tensor]:
    """Keyword arguments of the model; in float32, as the latents are (autocast narrows what it wants to)."""
    given = {name: batch[name] for name in CONDITIONS if name in batch}
    if ("labels" in given) == ("prompt_embeds" in given) or ("labels" in given and len(given) > 1):
        raise T5Error(
            "a batch must hold 'labels', or 'prompt_embeds' with 'pooled' or 'prompt_mask' where the model takes them; "
            f"got {sorted(batch)}"
        )
    return {CONDITIONS[name]: t.float() if t.is_floating_point() else t for name, t in given.items()}


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of 8-bit values x, scaled to [-1, 1], under a normal distribution summed over each value's bin."""
    upper = torch.where(x > 0.999, torch.inf, (x - mean + 1 / 255) / std)
    lower = torch.where(x < -0.999, -torch.inf, (x - mean - 1 / 255) / std)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return mass.clamp_min(1e-12).log()


@functools.cache
def _flow(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


@functools.cache
def _diffusion(steps: int, beta_start: float, beta_end: float) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=steps, beta_start=beta_start, beta_end=beta_end, beta_schedule="linear")


@functools.cache
def _tables(noising: NoiseAndVariance, device: torch.device) -> dict[str, Tensor]:
    """Of each step (steps,): signal and noise in x_t, the true step's mean, and the range of its log-variance.

    They stay on the device, because nothing can be moved to it while a graph is being recorded.
    """
    betas = noising._scheduler().betas.double()
    kept = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    least = betas * (1 - before) / (1 - kept)
    least[0] = least[1]  # it is 0, and never used: the last step's term is a likelihood
    tables = {
        "signal": kept.sqrt(),
        "noise": (1 - kept).sqrt(),
        "from_start": betas * before.sqrt() / (1 - kept),
        "from_noisy": (1 - before) * (1 - betas).sqrt() / (1 - kept),
        "log_least": least.log(),
        "log_largest": betas.log(),
    }
    return {name: values.float().to(device) for name, values in tables.items()}
