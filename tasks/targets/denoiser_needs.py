"""What building a denoiser needs of a machine, from its settings and the pipeline's configs: disk, memory, work."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5lib.data.buckets import bucket_sizes
from t5lib.report.models import MODELS
from t5lib.utils.errors import SourceError, T5Error
from t5lib.utils.files import read_json
from tasks.runtime import cards
from tasks.runtime.needs import Check, Memory, Needs, Remote, Room, Work
from tasks.targets import diffusers_folder, pipeline_checks, training_needs
from tasks.targets.denoiser_images import ShardsConfig
from tasks.targets.denoiser_shape import Shape
from tasks.targets.expected_pipelines import TRANSFORMER, expected
from tasks.targets.image_count import Images, counted, remote_images
from tasks.targets.teacher_samples import SPLITS

HALF, SINGLE = 2, 4  # bytes of a number
ABOUT = 3_000  # bytes of a sample's JSON and of what a tar adds to its two files
PNG = 1.7  # bytes a pixel of a photograph-like picture, about
FITTED_PROJECTIONS = 6  # of a joint attention: q, k and v of image and text
LAST_JOINT = 5  # of the layer set "paper"
TEACHERS = ("source",)


@dataclass(frozen=True)
class Denoiser:
    """A target of this kind, as far as its machine is concerned.

    Attributes:
        saved: bytes of the denoiser in single precision.
        layers: attentions that are converted.
        image, text: tokens of an image as it is encoded, and of its caption.
        drawn: the same of an image that is drawn, and its pixels.
    """

    sections: dict[str, Any]
    shape: Shape
    text_parameters: int
    pixels_per_latent: int
    area: int
    drawn_area: int
    train: Images
    val: Images

    @property
    def saved(self) -> int:
        return self.shape.saved_bytes

    @property
    def size(self) -> training_needs.Size:
        return training_needs.Size(self.saved, self.shape.parameters)

    @property
    def layers(self) -> int:
        count = self.shape.blocks + self.shape.dual
        everything = tuple(range(count))
        paper = everything[max(0, self.shape.blocks - LAST_JOINT) :] if self.shape.text_width else everything
        kinds = self.sections["convert"].of_layers(count, {"all": everything, "paper": paper})
        return sum(bool(kind) for kind in kinds)

    def tokens(self, area: int) -> tuple[int, int]:
        return self.shape.tokens(area, self.pixels_per_latent, self.sections["shards"].max_sequence_length)

    def numbers(self, images: int) -> int:
        """Numbers in the tokens of `images` images in a pass, in which activations are counted."""
        return images * sum(self.tokens(self.area)) * self.shape.channels

    def flops(self, area: int) -> int:
        return self.shape.flops(*self.tokens(area))

    @property
    def sample_count(self) -> int:
        """How many the softmax model draws to learn from."""
        return sum(self.sections["shards"].drawn(split) for split in SPLITS)

    @property
    def models(self) -> list[str]:
        """Stages whose models are evaluated."""
        left_out = set() if self.sections["align"].steps else {"align"}
        left_out |= set() if self.sections["shards"].train else {"finetune", "control"}
        return [model.made_by for model in MODELS if model.made_by not in left_out]

    @property
    def recipes(self) -> dict[str, Any]:
        """Recipes of the stages that train the whole model, or its new parts, as one."""
        aligned = {"align": self.sections["align"]} if self.sections["align"].steps else {}
        tuned = dict.fromkeys(("finetune", "control"), self.sections["finetune"])
        frozen = {"freeze": self.sections["freeze"].train}
        return aligned | frozen | (tuned if self.sections["shards"].train else {})


def needs(sections: dict[str, Any], root: Path, target: str, *, online: bool, pieces: int) -> Needs:
    """See Target."""
    source = sections["fetch"].source
    folder = diffusers_folder.known(source, root)
    configs = folder or (_described(source, root) if online else None)
    train, val = (_all_of(sections["shards"], split, root) for split in SPLITS)
    checks = [
        *_checked(configs, source),
        *(training_needs.check_control(sections["finetune"]) if sections["shards"].train else ()),
        *_enough(sections, train, val),
    ]
    remotes = _remotes(sections, root, target, fetched=folder is not None)
    one = _denoiser(sections, configs, train, val)
    if one is None:
        unknown = Check("size of the model", "its config cannot be reached", known=False)
        return Needs(remotes, checks=(*checks, unknown))
    made = {stage.stem for stage in root.glob(f"data/out/{target}/*.json")}
    return Needs(remotes, _rooms(one, made), tuple(_memories(one, pieces)), tuple(_works(one, made)), tuple(checks))


def _all_of(shards: ShardsConfig, split: str, root: Path) -> Images:
    """Images and samples together."""
    held, drawn = counted(shards, split, root), shards.drawn(split)
    if not drawn:
        return held
    how = f"{drawn:,} samples" + (f"; images {held.how}" if held.count != 0 else "")
    return Images(None if held.count is None else held.count + drawn, None, how)


def _described(source: str, root: Path) -> Path | None:
    """The hub's configs; None where they are not to be had, which another line says (tasks.runtime.preflight)."""
    try:
        return pipeline_checks.described(source, root / "data/models")
    except SourceError:
        return None


def _denoiser(sections: dict[str, Any], folder: Path | None, train: Images, val: Images) -> Denoiser | None:
    known = expected(sections["fetch"].source)
    if folder is not None:
        transformer, pixels = read_json(folder / TRANSFORMER), diffusers_folder.pixels_per_latent(folder)
    elif known is not None:
        transformer, pixels = known.transformer, known.pixels_per_latent
    else:
        return None
    text = known.text_parameters if known else _text_parameters(folder)
    sizes = bucket_sizes(sections["shards"].encode.buckets)
    area = max(math.prod(size) for size in sizes)
    drawn = sections["evaluate"].sampling.size or (transformer["sample_size"] * pixels,) * 2
    return Denoiser(
        sections=sections,
        shape=Shape.of(transformer),
        text_parameters=text,
        pixels_per_latent=pixels,
        area=area,
        drawn_area=math.prod(drawn),
        train=train,
        val=val,
    )


def _text_parameters(folder: Path | None) -> int:
    parts = folder.glob("text_encoder*") if folder else ()
    headers = [pipeline_checks.header_of(part) for part in parts]
    return sum(math.prod(shape) for header in headers for _, shape in header.values())


def _checked(folder: Path | None, source: str) -> list[Check]:
    """The pipeline's configs, where they are known."""
    what = "pipeline's configs"
    if folder is None:
        return [Check(what, "not fetched; checked before the weights are", known=False)]
    try:
        diffusers_folder.transformer_class(folder)
        pipeline_checks.check_parts(folder)
    except T5Error as error:
        return [Check(what, "cannot be converted", str(error))]
    problems = pipeline_checks.differences(folder, source)
    if not problems:
        return [Check(what, "as expected" if expected(source) else "there")]
    return [Check(what, "other than expected", problem, essential=False) for problem in problems]


def _enough(sections: dict[str, Any], train: Images, val: Images) -> list[Check]:
    """Images that stages ask for by number."""
    asked = {
        "diagnose.images": (train, sections["diagnose"].images, "training"),
        "explain.images": (val, sections["explain"].images, "validation"),
    }
    return [
        Check(name, f"{number} {split} images of {images.count}", f"set {name}: {images.count}, or give more images")
        for name, (images, number, split) in asked.items()
        if images.count is not None and number > images.count
    ]


def _remotes(sections: dict[str, Any], root: Path, target: str, *, fetched: bool) -> tuple[Remote, ...]:
    source, known = sections["fetch"].source, expected(sections["fetch"].source)
    size = known.download if known else None
    found = [] if fetched else [Remote("the pipeline", diffusers_folder.whole(source), size)]
    found += remote_images(sections["shards"], root, target)
    return tuple(remote for remote in found if remote.source.startswith("hf:"))


def _rooms(one: Denoiser, made: set[str]) -> tuple[Room, ...]:
    sections = one.sections
    left = [model for model in MODELS if model.made_by not in made]
    sizes = {stage: training_needs.checkpoint_bytes(one.size, recipe) for stage, recipe in one.recipes.items()}
    largest, stage = max(((size, stage) for stage, size in sizes.items() if stage not in made), default=(0, "finetune"))
    section = {"freeze": "freeze.train", "control": "finetune"}.get(stage, stage)
    drawn = round(PNG * one.drawn_area) * sections["evaluate"].samples * len(one.models)
    samples = [Room("samples", round(PNG * one.area) * one.sample_count, certain=False, out=True, why="about")]
    each = _encoded_bytes(one)
    count = None if one.train.count is None or one.val.count is None else one.train.count + one.val.count
    return (
        *(samples if one.sample_count and "shards" not in made else ()),
        Room(
            "encoded images",
            0 if "shards" in made else None if count is None else each * count,
            certain=False,
            out=True,
            why=f"{each / 1e6:.2f} MB each" + (f", {count:,} of them ({one.train.how})" if count else ""),
            change=f"fewer images: with 10,000 it is {each / 1e5:,.0f} GB" if count and each * count > 1e11 else "",
        ),
        Room("models", one.saved * len(left), out=True, why=f"{len(left)} of {one.saved / 1e9:.1f} GB"),
        Room("checkpoints", largest, why="at the most, while it trains", change=f"{section}.checkpoints_kept: 1"),
        Room("drawn pictures", 0 if "evaluate" in made else drawn, certain=False, out=True, why="about"),
    )


def _encoded_bytes(one: Denoiser) -> int:
    """Of an encoded image, with its caption (t5lib.data.encoding)."""
    channels, (_, text) = one.shape.latents[0], one.tokens(one.area)
    latent = channels * one.area // one.pixels_per_latent**2 * (2 if one.sections["shards"].encode.flip else 1)
    return HALF * (latent + text * (one.shape.text_width or 0) + one.shape.pooled_width) + ABOUT


def _memories(one: Denoiser, pieces: int) -> list[Memory]:
    sections = one.sections
    training = {stage: recipe for stage, recipe in one.recipes.items() if stage != "control"}
    found = [_sampling(one) if one.sample_count else _encoding(one)]
    if sections["calibrate"].steps:
        found.append(_calibration(one))
    for stage, recipe in training.items():
        teacher = stage == "align" or bool(getattr(recipe, "align", 0) and getattr(recipe, "teacher", "") in TEACHERS)
        known = stage, one.size, recipe, one.shape.blocks, one.numbers
        found.append(training_needs.memory(*known, teacher=teacher, pieces=pieces))
    return [*found, _evaluation(one)]


def _encoding(one: Denoiser) -> Memory:
    encoders, config = HALF * one.text_parameters, one.sections["shards"].encode

    def likely(images: int) -> int:
        return encoders + cards.ENCODED * one.area * images

    return Memory("shards", encoders, likely(config.batch_size), _fewer("shards.encode", config.batch_size, likely))


def _calibration(one: Denoiser) -> Memory:
    """Student and teacher, what the teacher's attentions got and gave, and a step through all new layers."""
    config, layers = one.sections["calibrate"], one.layers
    certain = 2 * one.saved
    projections = FITTED_PROJECTIONS * one.shape.channels**2 * layers * 4 * SINGLE if config.lr_inherited else 0

    def likely(images: int) -> int:
        changed = replace(config, batch_size=images)
        return certain + projections + training_needs.fitting_bytes(changed, layers, one.numbers)

    return Memory("calibrate", certain, likely(config.batch_size), _fewer("calibrate", config.batch_size, likely))


def _sampling(one: Denoiser) -> Memory:
    """The softmax pipeline in bf16; afterwards its encoders take less."""
    return _drawing(one, "shards", one.sections["shards"].samples, "shards.samples", one.saved // 2, one.area)


def _evaluation(one: Denoiser) -> Memory:
    """The pipeline in bf16, beside it the next model in single precision, from which its held-out loss is taken."""
    sampling, models = one.sections["evaluate"].sampling, one.saved * 3 // 2
    return _drawing(one, "evaluate", sampling, "evaluate.sampling", models, one.drawn_area)


def _drawing(one: Denoiser, stage: str, sampling: Any, section: str, models: int, area: int) -> Memory:
    text = HALF * one.text_parameters

    def likely(images: int) -> int:
        return models + text + cards.DRAWN * area * images

    certain = min(models, one.saved) + text
    return Memory(stage, certain, likely(sampling.batch_size), _fewer(section, sampling.batch_size, likely))


def _fewer(section: str, batch: int, likely: Any) -> tuple[tuple[str, int], ...]:
    """Half as many images at once, and half of those, down to one."""
    found = []
    while batch > 1:
        batch //= 2
        found.append((f"{section}.batch_size: {batch}", likely(batch)))
    return tuple(found)


def _works(one: Denoiser, made: set[str]) -> list[Work]:
    sections, calibrate, forward = one.sections, one.sections["calibrate"], one.flops(one.area)
    count = None if one.train.count is None or one.val.count is None else one.train.count + one.val.count
    sampling, samples = sections["evaluate"].sampling, sections["evaluate"].samples
    flips = 2 if sections["shards"].encode.flip else 1
    fit = "fit" if calibrate.compile is False else "fit compiled"
    tuned = one.recipes.get("finetune")
    works = [
        Work("shards", "draw", _drawn(one, sections["shards"].samples, one.sample_count, one.area)),
        Work("shards", "encode", None if count is None else float(count * one.area * flips)),
        Work("calibrate", fit, float(calibrate.steps * one.numbers(calibrate.batch_size) * one.layers)),
        Work("align", "train", _trained(sections["align"], forward, teacher=True)),
        Work("freeze", "train", _trained(sections["freeze"].train, forward)),
        *(
            Work(stage, "train", _trained(tuned, forward), _shorter(tuned))
            for stage in ("finetune", "control")
            if tuned
        ),
        Work(
            "evaluate",
            "draw",
            _drawn(one, sampling, samples * len(one.models), one.drawn_area),
            f"evaluate.samples: {max(16, samples // 4)} is four times as fast",
        ),
    ]
    return [work for work in works if work.amount != 0 and work.stage not in made]


def _drawn(one: Denoiser, sampling: Any, images: int, area: int) -> float:
    """FLOPs of drawing so many images."""
    return float(images * sampling.steps * (2 if sampling.guidance > 1 else 1) * one.flops(area)) if images else 0.0


def _trained(recipe: Any, forward: int, teacher: bool = False) -> float:
    """FLOPs of a training: forward, backward, forward again where activations are not kept, the teacher's forward."""
    passes = 3 + recipe.recomputed_share + (teacher or bool(getattr(recipe, "align", 0)))
    return float(recipe.steps * recipe.batch_size * recipe.accumulate * passes * forward)


def _shorter(recipe: Any) -> str:
    return f"finetune.steps: {max(1, recipe.steps // 2)} is twice as fast"
