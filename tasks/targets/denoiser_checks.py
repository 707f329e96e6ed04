"""Settings of a denoiser held against its pipeline and the manifests of its images, where they lie on this machine."""

import math
from pathlib import Path
from typing import Any

import torch

from t5lib.data.buckets import bucket_sizes
from t5lib.data.remote import is_remote
from t5lib.data.shards import ShardSet
from t5lib.evaluation.generation import check_sampling
from t5lib.evaluation.scores import LEAST
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize
from t5lib.training.objectives import noising_of
from t5lib.utils.errors import T5Error
from tasks.targets import diffusers_folder, teacher_samples
from tasks.targets.base import check_model, named
from tasks.targets.denoiser_images import ShardsConfig
from tasks.targets.image_shards import refuse_overlap


def check_pipeline(folder: Path, sections: dict[str, Any], images: tuple[ShardSet | None, ...]) -> None:
    """Raises T5Error for settings, or `images` of manifests, that do not suit the pipeline in `folder`."""
    with named("shards"):
        _check_conditions(folder, sections["shards"], images)
    benchmark, pixels = sections["benchmark"], diffusers_folder.pixels_per_latent(folder)
    model = diffusers_folder.blank(folder)
    with named("shards.encode.buckets"):
        sizes = bucket_sizes(sections["shards"].encode.buckets)
        _check_sizes(folder, sizes)
    with named("evaluate.sampling"):
        _check_sizes(folder, tuple(filter(None, [sections["evaluate"].sampling.size])))
        if not diffusers_folder.takes_text(folder):
            side, _ = diffusers_folder.image_size(folder)
            check_sampling(sections["evaluate"].sampling, diffusers_folder.scheduler(folder / "scheduler"), side)
    size = ExampleSize(max(sizes[0]), pixels_per_latent=pixels, text_tokens=1)
    check_model(model, sections, family_of(model).example_inputs(model, size))
    if benchmark.pixels_per_latent != pixels:
        raise T5Error(
            f"benchmark.pixels_per_latent is {benchmark.pixels_per_latent}; this pipeline has {pixels}: write that"
        )
    with named("data.objective"):
        noising_of(diffusers_folder.scheduler(folder / "scheduler"), **sections["data"].objective)


def _check_sizes(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """Raises T5Error unless the pipeline's denoiser takes images of these sizes, (height, width) in pixels."""
    model, pixels = diffusers_folder.blank(folder), diffusers_folder.pixels_per_latent(folder)
    adapter, unit = family_of(model), pixels * diffusers_folder.patch(folder)
    if wrong := [size for size in sizes if any(side % unit for side in size)]:
        raise T5Error(f"{wrong[:5]} are not multiples of {unit} pixels, the width of a token")
    for height, width in sizes:
        adapter.check_resolution(model, ExampleSize(max(height, width), pixels_per_latent=pixels))
        latents = torch.empty(1, adapter.in_channels(model), height // pixels, width // pixels, device="meta")
        adapter.grid(model, {adapter.input_name: latents})


def _check_conditions(folder: Path, config: Any, images: tuple[ShardSet | None, ...]) -> None:
    """Raises T5Error unless images come with what the pipeline draws from."""
    if diffusers_folder.takes_text(folder):
        sources = [source for source in (config.train, config.val) if source]
        if other := [source for source in sources if not source.startswith("file:") and not is_remote(source)]:
            raise T5Error(
                f"'{other[0][:200]}' is not a source of captioned images; expected file:FOLDER, file:PATTERN or an "
                "address such as https://HOST/train-{0000..0099}.tar"
            )
        return
    own = diffusers_folder.classes(folder)  # the label after the last one is that of no class
    for each in filter(None, images):
        if len(each.classes) != own:
            raise T5Error(
                f"{each.name} lists {len(each.classes)} classes; expected {own}, those of the denoiser in its order, "
                "also where some have no image"
            )


def check_numbers(sections: dict[str, Any], train: ShardSet | None, val: ShardSet | None) -> None:
    """Raises T5Error where fewer images are known to be there than are asked for, or one of them is there twice.

    Args:
        train, val: what the manifests say; None where they are not known (yet).
    """
    shards = sections["shards"]
    wanted = {"diagnose.images": ("train", sections["diagnose"].images)}
    wanted |= {"explain.images": ("val", sections["explain"].images)}
    recipes = {"freeze.train": sections["freeze"].train}
    recipes |= {"finetune": sections["finetune"]} if shards.train else {}
    recipes |= {name: sections[name] for name in ("calibrate", "align") if sections[name].steps}
    wanted |= {f"{name}.batch_size": ("train", recipe.batch_size) for name, recipe in recipes.items()}
    known = {split: _known(images, shards, split) for split, images in (("train", train), ("val", val))}
    for name, (split, number) in wanted.items():
        most, why = known[split]
        if number > most:
            raise T5Error(f"{name} is {number}; expected at most {most}, {why}")
    most, why = known["val"]
    if most < LEAST:
        raise T5Error(f"shards.val gives {most} images, {why}; expected {LEAST} or more, to score pictures with")
    if train and val:
        refuse_overlap(train, val)


def check_samples(shards: ShardsConfig, root: Path, folder: Path | None) -> None:
    """Raises T5Error where the samples that are asked for cannot be drawn by the pipeline in `folder`."""
    if shards.samples:
        with named("shards.samples"):
            teacher_samples.check_samples(shards.samples, root, folder, bucket_sizes(shards.encode.buckets))


def _known(images: ShardSet | None, shards: ShardsConfig, split: str) -> tuple[float, str]:
    """How many images and samples there are at most, and how that is known; infinity where it is not."""
    limit, drawn = shards.limit, shards.drawn(split)
    if getattr(shards, split) is None:
        return drawn, "as many as shards.samples draws"
    more = f" with {drawn} samples" if drawn else ""
    if limit is not None and (images is None or images.count == limit):
        return limit + drawn, f"as many as shards.limit takes{more}"
    return (images.count + drawn, f"as many as {images.name} has{more}") if images else (math.inf, "")
