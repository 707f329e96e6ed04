"""Pretrain dit-micro from nothing and write it as a DiTPipeline folder (transformer and scheduler) with its card.

    python data/fashion-mnist/make.py --source … --train 24000 --val 5000 --out data/fashion-mnist-large
    python data/dit-micro/pretrain.py --images data/fashion-mnist-large/train.json \
        --out data/dit-micro/model --scratch data/scratch/dit-micro

A class-conditional DiT of pixels, without an autoencoder: Fashion-MNIST, 28 x 28 resized to 32 x 32 as the stage
`shards` does it, one channel from -1 to 1, in patches of 2: 256 tokens. It learns noise and variance as DiT does
(t5lib.training.objectives), one label in ten is dropped for guidance, and averaged weights are written, in half
precision. State is kept in --scratch, and the same command goes on from it. Needs a GPU for the real thing. Exits with
3 when stopped before the end.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from jinja2 import Template
from PIL import Image
from torch import Tensor, nn

from t5lib.data.batches import seeded
from t5lib.data.buckets import fit
from t5lib.data.decoding import image_of
from t5lib.data.shards import ShardSet
from t5lib.evaluation.generation import GenerateConfig, sample
from t5lib.training.objectives import Noised, noising_of
from t5lib.utils.files import atomic_dir, write_json, write_text

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where pretraining.py lies
from pretraining import PretrainConfig, Record, pretrain, zero_gates

FOLDER = Path(__file__).parent
SIDE = 32
CLASSES = 10
SAMPLING = GenerateConfig(steps=50, guidance=1.5, batch_size=250)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is done, and the size of the model."""

    minutes: float = 3.0
    steps: int = 1_000_000
    seed: int = 0
    batch: int = 512
    lr: float = 1e-3
    dropped_labels: float = 0.1
    threads: int = 6
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    scored: int = 1000


def read_images(manifest: Path) -> tuple[Tensor, Tensor]:
    """All images of a manifest (N, 1, 32, 32) in [-1, 1], and their classes (N,)."""
    samples = [sample for shard in ShardSet.read(manifest).shards for sample in shard.samples()]
    pictures = [np.asarray(fit(image_of(found, 1), (SIDE, SIDE))) for found in samples]
    labels = torch.tensor([int(found["cls"]) for found in samples])
    return torch.from_numpy(np.stack(pictures))[:, None].float() / 127.5 - 1, labels


def build(settings: Settings) -> DiTTransformer2DModel:
    """The untrained transformer. Labels are dropped in the batches: diffusers would drop them anew in every block."""
    model = DiTTransformer2DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=1,
        out_channels=2,
        num_layers=settings.layers,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
            nn.init.normal_(module.embedding_table.weight, std=0.02)
    zero_gates(model, model.proj_out_1, model.proj_out_2)
    return model


def scheduler() -> DDIMScheduler:
    """Unclipped: diffusers' DDIM clips the predicted image but goes on with the noise of the unclipped one, and guided
    images of a black background drift away."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")


def train(
    model: DiTTransformer2DModel, data: tuple[Tensor, Tensor], settings: Settings, scratch: Path, stop: float
) -> Record:
    noising, device = noising_of(scheduler()), model.device
    if device.type == "cuda":
        for block in model.transformer_blocks:
            block.compile(dynamic=False)

    def loss(batch: Noised) -> Tensor:
        return noising.loss(model(**batch.inputs, return_dict=False)[0], batch)

    schedule = PretrainConfig(
        minutes=settings.minutes,
        steps=settings.steps,
        lr=settings.lr,
        seed=settings.seed,
        untimed=1,
        threads=settings.threads,
    )
    batch_at = partial(noised, data, settings, noising, device)
    return pretrain("dit", model, batch_at, loss, schedule, scratch / "dit.pt", stop)


def noised(data: tuple[Tensor, Tensor], settings: Settings, noising, device: torch.device, step: int) -> Noised:
    """The batch of a step, some of its labels the one that means none."""
    images, labels = data
    chance = seeded(settings.seed, step)
    rows = torch.randint(len(images), (settings.batch,), generator=chance)
    dropped = torch.rand(settings.batch, generator=chance) < settings.dropped_labels
    batch = {"latents": images[rows], "labels": labels[rows].masked_fill(dropped, CLASSES)}
    return noising.noised(batch, chance).to(device)


@torch.compiler.set_stance("force_eager")  # compiling for a few batches costs more than it gains
@torch.no_grad()
def held_out_loss(model: DiTTransformer2DModel, data: tuple[Tensor, Tensor], settings: Settings) -> float:
    """On images that were not trained on."""
    noising = noising_of(scheduler())
    losses = []
    for step in range(8):
        batch = noised(data, settings, noising, model.device, step)
        losses.append(float(noising.loss(model(**batch.inputs, return_dict=False)[0], batch)))
    return sum(losses) / len(losses)


def scores(pipeline: DiTPipeline, train: tuple, val: tuple, settings: Settings) -> dict[str, float]:
    """Of samples, evenly of all classes, and beside them of validation images: the share whose nearest training image
    (by pixels) is of their class, and the mean distance to it (root mean square, pixels from -1 to 1)."""
    labels = [index % CLASSES for index in range(settings.scored)]
    made = sample(pipeline, labels, [settings.seed + index for index in range(len(labels))], SAMPLING)
    found = {"samples": len(labels), "steps": SAMPLING.steps, "guidance": SAMPLING.guidance}
    for name, images, wanted in (("", made / 127.5 - 1, torch.tensor(labels)), ("val_", *val)):
        distance, nearest = torch.cdist(images.flatten(1), train[0].flatten(1)).min(1)
        found[f"{name}class"] = float((train[1][nearest] == wanted).float().mean())
        found[f"{name}distance"] = float(distance.mean()) / SIDE
    return found


def write(out: Path, model: DiTTransformer2DModel, facts: dict, train: tuple, val: tuple, settings: Settings) -> None:
    """The folder, whole or not at all: the pipeline, how it was made, what it scores, pictures and the card."""
    device = model.device
    saved = DiTPipeline(transformer=model.cpu().half(), vae=None, scheduler=scheduler())
    with atomic_dir(out) as folder:
        saved.save_pretrained(folder)
        pipeline = DiTPipeline.from_pretrained(folder, vae=None).to(device)
        facts["scores"] = scores(pipeline, train, val, settings)
        sheet(pipeline).save(folder / "samples.png", optimize=True)
        write_json(folder / "pretraining.json", facts)
        template = Template((FOLDER / "card.md.j2").read_text(encoding="utf-8"), keep_trailing_newline=True)
        write_text(folder / "README.md", template.render(facts))


def sheet(pipeline: DiTPipeline) -> Image.Image:
    """Eight samples of every class, a class a column."""
    labels = [index % CLASSES for index in range(8 * CLASSES)]
    made = sample(pipeline, labels, list(range(len(labels))), SAMPLING)
    rows = made.view(8, CLASSES, SIDE, SIDE).permute(0, 2, 1, 3).reshape(8 * SIDE, CLASSES * SIDE)
    return Image.fromarray(rows.numpy())


def run(settings: Settings, images: Path, out: Path, scratch: Path, stop: float = float("inf")) -> None:
    """Everything; exits with 3 when `stop` (time.monotonic()) came first. Validation images lie beside `images`."""
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    data, val = read_images(images), read_images(images.with_name("val.json"))
    model = build(settings).to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(weight.numel() for weight in model.parameters())
    record = train(model, data, settings, scratch, stop)
    if not record.finished:
        print("stopped; the same command resumes")
        sys.exit(3)
    facts = {
        "settings": asdict(settings),
        "parameters": parameters,
        "images": len(data[0]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "dit": vars(record) | {"held_out": held_out_loss(model, val, settings)},
    }
    write(out, model, facts, data, val, settings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=FOLDER.parent / "fashion-mnist/train.json", help="manifest")
    parser.add_argument("--out", type=Path, default=FOLDER / "model", help="the pipeline's folder")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the state that a later run resumes from")
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="most steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="seconds, then save the state and exit 3"
    )
    args = parser.parse_args(arguments)
    settings = Settings(minutes=args.minutes, steps=args.steps, seed=args.seed)
    run(settings, args.images, args.out, args.scratch, time.monotonic() + args.stop_after)


if __name__ == "__main__":
    main()
