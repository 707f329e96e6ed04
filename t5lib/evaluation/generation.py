"""Images from a diffusers pipeline, softmax or converted: text to image (SD3, Flux, …) and class to image (DiT).

Every image has a noise generator of its own, so that it does not depend on what it is batched with, and a source and a
converted model can be compared image by image. Files carry what made them in their PNG text, are written atomically,
and are left as they are when they are whole: an interrupted run goes on where it was.

Shapes: B images, C channels (3, or 1 of a grey model), H and W pixels, h and w of the latents.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import PngImagePlugin
from pydantic import Field
from torch import Tensor

from t5lib.data.decoding import decode, opened
from t5lib.evaluation.prompts import Job
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.utils.config import BatchSize, Pair, Pixels, Repeats, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file
from t5lib.utils.progress import progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TextTokens = Annotated[int, Field(ge=1, le=512)]  # of the T5 encoder: diffusers' SD3 pipelines take no more
Guidance = Annotated[float, Field(ge=0, le=1000)]
RECIPE = "t5"  # the key of a PNG's text


@settings
class GenerateConfig:
    """How images are sampled.

    Attributes:
        steps: of the pipeline's scheduler.
        guidance: scale of classifier-free guidance; 1 or less: none.
        size: (height, width) in pixels; None: the model's own.
        max_sequence_length: tokens of the T5 encoder's text; None: the pipeline's own choice.
        batch_size: images at once; changes speed and memory, and images in the last bits at most.
    """

    steps: Repeats = 28
    guidance: Guidance = 7.0
    size: Pair[Pixels] | None = None
    max_sequence_length: TextTokens | None = None
    batch_size: BatchSize = 4


def classes_of(pipeline: "DiffusionPipeline") -> int | None:
    """The number of classes of a class-conditional (DiT) pipeline; None of one that takes text."""
    from diffusers import DiTTransformer2DModel

    transformer = getattr(pipeline, "transformer", None)
    return transformer.config.num_embeds_ada_norm if isinstance(transformer, DiTTransformer2DModel) else None


@torch.no_grad()
def sample(
    pipeline: "DiffusionPipeline", prompts: Sequence[str | int], seeds: Sequence[int], config: GenerateConfig
) -> Tensor:
    """One image for each prompt and seed: (B, C, H, W) uint8 on the CPU.

    Args:
        pipeline: a diffusers pipeline on its device; a DiT pipeline without VAE has pixels for latents.
        prompts: texts, or class numbers for a DiT.
        seeds: of the noise, drawn on the CPU, so that every device starts from the same.

    Raises:
        T5Error: other numbers of prompts and seeds, a prompt that is no text or no class of the model, or a size or
            number of steps that the pipeline cannot sample with.
    """
    if len(prompts) != len(seeds):
        raise T5Error(f"{len(prompts)} prompts and {len(seeds)} seeds; expected a seed for each prompt")
    pipeline.set_progress_bar_config(disable=True)
    draw = _from_text if classes_of(pipeline) is None else _from_classes
    parts = [
        draw(pipeline, prompts[start : start + config.batch_size], seeds[start : start + config.batch_size], config)
        for start in range(0, len(prompts), config.batch_size)
    ]
    return torch.cat(parts)


def generate(pipeline: "DiffusionPipeline", jobs: Sequence[Job], config: GenerateConfig, *, model: str) -> int:
    """Make the files that are not there yet, and return how many those were.

    Args:
        jobs: of t5lib.evaluation.prompts.jobs, or your own.
        model: names the pipeline in the files, so that another one's images are not taken for its own; progress tells
            it too, of a path the last part.

    Raises:
        T5Error: a whole file that was made with other settings, or what `sample` refuses.
    """
    missing = [job for job in jobs if not _is_made(job, _recipe(job, config, model))]
    with progress(f"generate {Path(model).name}", len(jobs), len(jobs) - len(missing)) as report:
        for done, (job, images) in enumerate(_made(pipeline, missing, config), len(jobs) - len(missing) + 1):
            _write(_side_by_side(images), job.path, _recipe(job, config, model))
            report.advance(done)
    return len(missing)


def read_images(paths: Sequence[Path], *, channels: int = 3) -> Tensor:
    """PNG or other image files of one size as (B, C, H, W) uint8.

    Raises:
        T5Error: none, one that cannot be read, or files of different sizes (named).
    """
    from torchvision.transforms.functional import pil_to_tensor

    if not paths:
        raise T5Error("there is no image to read; pass the paths of some")
    images = []
    for path in paths:
        try:
            images.append(pil_to_tensor(decode(path, channels)))
        except T5Error as error:
            raise T5Error(f"{path} is not a readable image ({error}); replace it, or have it made again") from error
        if images[-1].shape != images[0].shape:
            shapes = f"{tuple(images[-1].shape[1:])}, {paths[0]} {tuple(images[0].shape[1:])}"
            raise T5Error(f"images of different sizes: {path} is {shapes} (height, width); pass those of one size")
    return torch.stack(images)


def _from_text(pipeline: Any, prompts: Sequence[str | int], seeds: Sequence[int], config: GenerateConfig) -> Tensor:
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        raise T5Error(f"prompt {wrong[0]!r}: {type(pipeline).__name__} draws from text; expected a string")
    _check_size(pipeline, config)
    height, width = config.size or (None, None)
    length = {} if config.max_sequence_length is None else {"max_sequence_length": config.max_sequence_length}
    images = pipeline(
        prompt=list(prompts),
        generator=_generators(seeds),
        num_inference_steps=config.steps,
        height=height,
        width=width,
        output_type="pt",
        **length,
        **_guidance(pipeline, len(prompts), config),
    ).images
    return _bytes(images.float())


def _check_size(pipeline: Any, config: GenerateConfig) -> None:
    """What pipelines refuse or round, with the setting's name."""
    for side in config.size or ():
        try:
            size = ExampleSize(side, pixels_per_latent=pipeline.vae_scale_factor)
            family_of(pipeline.transformer).check_resolution(pipeline.transformer, size)
        except T5Error as error:
            raise T5Error(f"size {config.size}: {error}") from None


def _guidance(pipeline: Any, prompts: int, config: GenerateConfig) -> dict[str, Any]:
    """Arguments of the pipeline's call. Qwen-Image's has another name for the scale, and asks for negative prompts."""
    if inspect.signature(pipeline.__call__).parameters["guidance_scale"].default is not None:
        return {"guidance_scale": config.guidance}
    return {"true_cfg_scale": config.guidance, "negative_prompt": [" "] * prompts} if config.guidance > 1 else {}


def _from_classes(pipeline: Any, prompts: Sequence[str | int], seeds: Sequence[int], config: GenerateConfig) -> Tensor:
    """Sampling as in "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).

    diffusers' own DiTPipeline takes class 1000 for "no class" and needs a VAE; here it is the class after the last.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    device, generators = pipeline._execution_device, _generators(seeds)
    classes, side = transformer.config.num_embeds_ada_norm, transformer.config.sample_size
    _check_classes(pipeline, prompts, classes, config)
    shape = (1, transformer.config.in_channels, side, side)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    labels = torch.tensor(prompts, device=device)
    scheduler.set_timesteps(config.steps, device=device)
    latents = torch.cat(noise).to(device) * scheduler.init_noise_sigma
    extra = _step_arguments(scheduler, generators)
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, step)
        predicted = _guided(transformer, scaled, step, labels, classes, config.guidance)
        if not _learned_variance(scheduler):
            predicted = predicted[:, : latents.shape[1]]
        latents = scheduler.step(predicted, step, latents, **extra).prev_sample
    pixels = _decode(pipeline, latents)
    pipeline.maybe_free_model_hooks()
    return _bytes((pixels.float() / 2 + 0.5).clamp(0, 1))


def _guided(transformer: Any, latents: Tensor, step: Tensor, labels: Tensor, nothing: int, guidance: float) -> Tensor:
    """The prediction (B, C or 2C, h, w), noise first, then what the variance follows from; guidance moves the noise."""
    dtype, channels = transformer.dtype, latents.shape[1]
    if guidance <= 1:
        return transformer(latents.to(dtype), timestep=step.expand(len(latents)), class_labels=labels).sample.float()
    both = torch.cat([latents, latents]).to(dtype)
    wanted = torch.cat([labels, torch.full_like(labels, nothing)])
    given, free = transformer(both, timestep=step.expand(len(both)), class_labels=wanted).sample.float().chunk(2)
    noise = free[:, :channels] + guidance * (given[:, :channels] - free[:, :channels])
    return torch.cat([noise, given[:, channels:]], dim=1)


def _decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Pixels (B, C, H, W), -1 to 1; without a VAE the latents are the pixels."""
    vae = getattr(pipeline, "vae", None)
    return latents if vae is None else vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample


def _learned_variance(scheduler: Any) -> bool:
    return str(scheduler.config.get("variance_type")).startswith("learned")


def _step_arguments(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """Schedulers that add noise draw it from the images' own generators."""
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _check_classes(pipeline: Any, labels: Sequence[str | int], classes: int, config: GenerateConfig) -> None:
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if wrong:
        raise T5Error(f"class {wrong[0]!r}: the model is class-conditional; expected numbers from 0 to {classes - 1}")
    vae = getattr(pipeline, "vae", None)
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    check_sampling(config, pipeline.scheduler, pipeline.transformer.config.sample_size * scale)


def check_sampling(config: GenerateConfig, scheduler: Any, side: int) -> None:
    """Raises T5Error unless a class-conditional pipeline of square images (`side`, in pixels) can sample so.

    diffusers' DDIM goes back `total // steps` a step whatever the spacing: the rest stays in the image as noise.
    """
    if config.size not in (None, (side, side)):
        raise T5Error(f"size {config.size}: this DiT makes images of ({side}, {side}); leave size out")
    steps = config.steps
    total = scheduler.config.get("num_train_timesteps", steps)
    if steps > total:
        raise T5Error(f"steps {steps}: this scheduler has {total}; expected at most that many")
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    if trailing and type(scheduler).__name__ == "DDIMScheduler" and total % steps:
        best = next((number for number in range(steps, total) if total % number == 0), total)
        raise T5Error(f"steps {steps}: this scheduler leaves noise unless they divide its {total}, as {best} do")


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8).cpu()


def _made(pipeline: Any, jobs: Sequence[Job], config: GenerateConfig) -> Iterator[tuple[Job, Tensor]]:
    """(job, its images (n, C, H, W)) as they come; batches run over the borders of jobs."""
    wanted = [(job, seed) for job in jobs for seed in job.seeds]
    ready: list[Tensor] = []
    position = 0
    for start in range(0, len(wanted), config.batch_size):
        batch = wanted[start : start + config.batch_size]
        ready += sample(pipeline, [job.prompt for job, _ in batch], [seed for _, seed in batch], config)
        while position < len(jobs) and len(ready) >= len(jobs[position].seeds):
            job = jobs[position]
            yield job, torch.stack(ready[: len(job.seeds)])
            del ready[: len(job.seeds)]
            position += 1


def _side_by_side(images: Tensor) -> Tensor:
    """(n, C, H, W) as one image (C, rows · H, 2 · W), row by row without a border; a single image as it is."""
    from torchvision.utils import make_grid

    return images[0] if len(images) == 1 else make_grid(images, nrow=2, padding=0)


def _recipe(job: Job, config: GenerateConfig, model: str) -> dict[str, Any]:
    settings = asdict(config) | {"size": list(config.size) if config.size else None}
    del settings["batch_size"]
    return {"model": model, "prompt": job.prompt, "seeds": list(job.seeds), **settings}


def _is_made(job: Job, recipe: dict[str, Any]) -> bool:
    try:
        with opened(job.path) as image:
            text = image.info.get(RECIPE)
            image.verify()
    except T5Error:  # not there, cut off or damaged
        return False
    found = json.loads(text) if text else {}
    differing = [name for name in recipe if found.get(name) != recipe[name]]
    if differing:
        name = differing[0]
        raise T5Error(
            f"{job.path} was made with {name} {found.get(name)!r}, now it is {recipe[name]!r}; name a new folder for "
            "other settings, or delete the old images"
        )
    return True


def _write(image: Tensor, path: Path, recipe: dict[str, Any]) -> None:
    from torchvision.transforms.functional import to_pil_image

    text = PngImagePlugin.PngInfo()
    text.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    with atomic_file(path) as temporary:
        to_pil_image(image).save(temporary, format="PNG", pnginfo=text)
