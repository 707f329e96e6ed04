"""Pretrain sd35-micro from nothing and write it as a StableDiffusion3Pipeline folder with its card.

    python data/sd35-micro/pretrain.py --out data/sd35-micro/model --scratch data/scratch/sd35-micro

Three steps, each of which goes on where it was stopped (state in --scratch; --stop-after ends a run in time):

1. The autoencoder learns to copy composed pictures: absolute and squared error, and a slight pull of the latents
   towards a normal distribution.
2. A pool of pictures is composed and encoded once, at both sizes; latents are scaled to mean 0 and deviation 1.
3. Transformer and text encoders learn together from the rectified-flow loss, one step at 64 px, one at 128 px. The
   text encoders need no objective of their own: as in latent diffusion (arXiv 2112.10752, section 4.3), the denoiser's
   gradient says what is worth knowing in a caption, and 45,000 captions of 700 words are few enough to learn from it.
   One caption in ten is empty, for guidance. Averaged weights are written, in half precision.

Needs a GPU for the real thing. Exits with 3 when stopped before the end.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import card
import torch
from captions import every_caption
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from networks import DOWN, SIZES, Captioned, MicroConfig, build_vae
from scenes import Emoji, Scenes, compose, draw_scenes, read_sprites
from torch import Tensor
from vocabulary import LENGTH, clip_tokenizer, t5_tokenizer

from t5lib.data.batches import seeded
from t5lib.training.objectives import Noised, noising_of
from t5lib.utils.files import atomic_dir, read_json, write_json, write_text

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where pretraining.py lies
from pretraining import PretrainConfig, Record, pretrain, zero_gates

FOLDER = Path(__file__).parent
BESIDE = ("clean", "noise", "level")  # what Noised holds beside the model's inputs
VAE, POOL, FLOW, HELD_OUT = range(4)  # first part of the seeds, so that no two steps draw the same


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is done; pairs are for 64 and 128 px. `steps` bound each of the two trainings, minutes permitting."""

    vae_minutes: float = 1.5
    minutes: float = 5.0
    steps: int = 1_000_000
    seed: int = 0
    vae_batch: tuple[int, int] = (256, 64)
    vae_lr: float = 1e-3
    kl: float = 3e-4
    batch: tuple[int, int] = (256, 64)
    lr: float = 1e-3
    pool: tuple[int, int] = (131072, 49152)
    empty_captions: float = 0.1
    graphs: bool = True
    scored_prompts: int = 256


@dataclass(kw_only=True)
class World:
    """What every step uses: the emoji, their sprites, all captions and their token ids; tensors on the device."""

    kinds: list[Emoji]
    sprites: Tensor
    captions: list[str]
    tokenizers: SimpleNamespace
    ids: Tensor

    @classmethod
    def make(cls, device: torch.device, kinds: int | None = None) -> "World":
        """With the first `kinds` emoji, or all."""
        found, sprites = read_sprites(FOLDER / "sprites.json")
        found, sprites = found[:kinds], sprites[:kinds].to(device)
        captions = every_caption([kind.name for kind in found])
        clip, t5 = clip_tokenizer(captions), t5_tokenizer(captions)
        tokenizers = SimpleNamespace(first=clip, second=clip, third=t5)
        ids = [
            tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
            for tokenizer in (clip, t5)
        ]
        ids = torch.cat([ids[0], ids[0], ids[1]], 1).to(device)
        return cls(kinds=found, sprites=sprites, captions=captions, tokenizers=tokenizers, ids=ids)

    @property
    def device(self) -> torch.device:
        return self.sprites.device

    def scenes(self, number: int, *seed: int) -> Scenes:
        return draw_scenes(number, len(self.kinds), seeded(*seed))


def train_vae(world: World, config: MicroConfig, settings: Settings, scratch: Path, stop: float):
    """The trained autoencoder, its latents' shift and scale in its config, and the record."""
    vae = build_vae(config).to(world.device, memory_format=torch.channels_last)
    if world.device.type == "cuda":
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)

    def batch_at(step: int) -> dict[str, Tensor]:
        which = step % len(SIZES)
        number, size = settings.vae_batch[which], SIZES[which]
        pictures = compose(world.sprites, world.scenes(number, settings.seed, VAE, step), size)
        chance = torch.Generator(world.device).manual_seed(settings.seed * 10_000_000 + step)
        shape = (number, config.latent_channels, size // DOWN, size // DOWN)
        return {"pictures": pictures, "noise": torch.randn(shape, generator=chance, device=world.device)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        pictures, noise = batch["pictures"], batch["noise"]
        found = vae.encode(pictures).latent_dist
        mean, logvar = found.mean.float(), found.logvar.float()
        error = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float() - pictures
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return error.abs().mean() + error.square().mean() + settings.kl * kl.mean()

    schedule = PretrainConfig(
        minutes=settings.vae_minutes,
        steps=settings.steps,
        lr=settings.vae_lr,
        seed=settings.seed,
        warmup=100,
        untimed=2,
        graphs=settings.graphs,
    )
    record = pretrain("vae", vae, batch_at, loss, schedule, scratch / "vae.pt", stop)
    trained = build_vae(config).to(world.device, memory_format=torch.channels_last)  # one that is not compiled
    trained.load_state_dict(vae.state_dict())
    return trained.requires_grad_(False).eval(), record


@torch.no_grad()
def encode(vae, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Latents drawn from the encoder's distribution, unscaled, in float32."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        return vae.encode(pictures).latent_dist.sample(generator).float()


def fill_pool(world: World, vae, which: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w) in half precision and caption numbers (N,) of composed scenes, on the device."""
    total, size = settings.pool[which], SIZES[which]
    shape = (total, vae.config.latent_channels, size // DOWN, size // DOWN)
    latents = torch.empty(shape, dtype=torch.float16, device=world.device)
    captions = torch.empty(total, dtype=torch.long, device=world.device)
    chance = torch.Generator(world.device).manual_seed(settings.seed * 10 + POOL)
    for begin in range(0, total, settings.vae_batch[which]):
        rows = slice(begin, min(begin + settings.vae_batch[which], total))
        scenes = world.scenes(rows.stop - begin, settings.seed, POOL, size, begin)
        latents[rows] = encode(vae, compose(world.sprites, scenes, size), chance)
        captions[rows] = scenes.captions()
    return latents, captions


def scale_latents(vae, pools: list[tuple[Tensor, Tensor]]) -> None:
    """Write into the autoencoder's config what brings latents to mean 0 and deviation 1."""
    shift = float(torch.stack([latents[:1024].float().mean() for latents, _ in pools]).mean())
    deviation = (
        float(torch.stack([(latents[:1024].float() - shift).square().mean() for latents, _ in pools]).mean()) ** 0.5
    )
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / deviation)


def train_flow(
    world: World,
    model: Captioned,
    vae,
    pools: list,
    config: MicroConfig,
    settings: Settings,
    scratch: Path,
    stop: float,
) -> Record:
    """Transformer and text encoders together."""
    noising = noising_of(FlowMatchEulerDiscreteScheduler(shift=config.shift))

    def batch_at(step: int) -> dict[str, Tensor]:
        which = step % len(SIZES)
        batch = noised(world, vae, pools[which], settings, noising, settings.batch[which], FLOW, step)
        return batch.inputs | {name: getattr(batch, name) for name in BESIDE}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in BESIDE}
        return flow_loss(model, noising, Noised(inputs=inputs, **{name: batch[name] for name in BESIDE}))

    schedule = PretrainConfig(
        minutes=settings.minutes,
        steps=settings.steps,
        lr=settings.lr,
        seed=settings.seed,
        untimed=2,
        graphs=settings.graphs,
    )
    zero_gates(model.transformer, model.transformer.proj_out)
    if world.device.type == "cuda":
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)
    return pretrain("flow", model, batch_at, loss, schedule, scratch / "flow.pt", stop)


def noised(world: World, vae, pool: tuple, settings: Settings, noising, number: int, part: int, step: int) -> Noised:
    """A batch of `number` latents of the pool, their captions' ids, some empty, and noise; the same for a seed.

    All but a few numbers an image is drawn on the device, where a step would otherwise wait for it.
    """
    latents, captions = pool
    chance = seeded(settings.seed, part, step)
    rows = torch.randint(len(latents), (number,), generator=chance).to(world.device)
    empty = (torch.rand(number, generator=chance) < settings.empty_captions).to(world.device)
    ids = world.ids[captions[rows].masked_fill(empty, len(world.ids) - 1)]
    drawn = {"latents": torch.zeros(number, 1, 1, 1), "prompt_embeds": ids, "pooled": ids}
    level = noising.noised(drawn, chance).to(world.device)
    clean = (latents[rows].float() - vae.config.shift_factor) * vae.config.scaling_factor
    chance = torch.Generator(world.device).manual_seed(chance.initial_seed() ^ 1)
    noise = torch.randn(clean.shape, generator=chance, device=world.device)
    noisy = torch.lerp(clean, noise, level.level[:, None, None, None])
    return replace(level, inputs=level.inputs | {"hidden_states": noisy}, clean=clean, noise=noise)


def flow_loss(model: Captioned, noising, batch: Noised) -> Tensor:
    inputs = batch.inputs
    velocity = model(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    return noising.loss(velocity, batch)


def train(world: World, config: MicroConfig, settings: Settings, scratch: Path, stop: float) -> tuple | None:
    """(pipeline, facts for the card), or None when stopped before the end."""
    vae, vae_record = train_vae(world, config, settings, scratch, stop)
    if not vae_record.finished:
        return None
    begun = time.monotonic()
    pools = [fill_pool(world, vae, which, settings) for which in range(len(SIZES))]
    scale_latents(vae, pools)
    print(f"pool: {' and '.join(map(str, settings.pool))} scenes in {time.monotonic() - begun:.0f} s", flush=True)
    torch.manual_seed(settings.seed + 1)
    model = Captioned(config, world.tokenizers).to(world.device)
    record = train_flow(world, model, vae, pools, config, settings, scratch, stop)
    if not record.finished:
        return None
    facts = {
        "settings": asdict(settings),
        "sizes": asdict(config),
        "emoji": len(world.kinds),
        "captions": len(world.captions) - 1,
        "parameters": sum(weight.numel() for part in (model, vae) for weight in part.parameters()),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "vae": vars(vae_record) | {"psnr": psnr(world, vae, settings)},
        "flow": vars(record) | {"held_out": held_out_loss(world, model, vae, config, settings)},
    }
    return assemble(model, vae, config, world.tokenizers), facts


@torch.no_grad()
def psnr(world: World, vae, settings: Settings) -> dict[str, float]:
    """PSNR of decoded means against pictures, in decibels, by size."""
    found = {}
    for size in SIZES:
        pictures = compose(world.sprites, world.scenes(64, settings.seed, HELD_OUT, size), size)
        copies = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        found[str(size)] = float(10 * torch.log10(4 / (copies - pictures).square().mean()))
    return found


@torch.compiler.set_stance("force_eager")  # compiling for a few batches costs more than it gains
@torch.no_grad()
def held_out_loss(world: World, model: Captioned, vae, config: MicroConfig, settings: Settings) -> dict[str, float]:
    """The flow loss of the averaged weights on scenes that no step drew, by size."""
    noising, found = noising_of(FlowMatchEulerDiscreteScheduler(shift=config.shift)), {}
    chance = torch.Generator(world.device).manual_seed(HELD_OUT)
    for which, size in enumerate(SIZES):
        number = settings.batch[which]
        scenes = world.scenes(number, settings.seed, HELD_OUT, size)
        latents = encode(vae, compose(world.sprites, scenes, size), chance)
        pool = latents, scenes.captions().to(world.device)
        batch = noised(world, vae, pool, settings, noising, number, HELD_OUT, size)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
            found[str(size)] = float(flow_loss(model, noising, batch))
    return found


def assemble(model: Captioned, vae, config: MicroConfig, tokenizers: SimpleNamespace) -> StableDiffusion3Pipeline:
    """The pipeline of trained parts, in half precision, on the CPU."""
    half = model.cpu().half()
    return StableDiffusion3Pipeline(
        transformer=half.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae.cpu().half(),
        text_encoder=half.text_encoder,
        tokenizer=tokenizers.first,
        text_encoder_2=half.text_encoder_2,
        tokenizer_2=tokenizers.second,
        text_encoder_3=half.text_encoder_3,
        tokenizer_3=tokenizers.third,
    )


def save(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save it so that loading without a dtype gives one dtype: diffusers then takes float32, but transformers the one
    its config names, and half-precision text encoders do not work with a transformer in single precision."""
    pipeline.save_pretrained(folder)
    for config in folder.glob("text_encoder*/config.json"):
        write_json(config, read_json(config) | {"dtype": "float32"})


def write(out: Path, pipeline: StableDiffusion3Pipeline, facts: dict, world: World, settings: Settings) -> None:
    """The folder, whole or not at all: the pipeline, how it was made, what it scores, pictures and the card."""
    with atomic_dir(out) as folder:
        save(pipeline, folder)
        facts["scores"] = card.scores(folder, world, settings.scored_prompts, settings.seed)
        card.samples(folder, world.device).save(folder / "samples.webp", quality=85)
        write_json(folder / "pretraining.json", facts)
        write_text(folder / "README.md", card.text(facts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "model", help="the pipeline's folder")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the state that a later run resumes from")
    parser.add_argument("--vae-minutes", type=float, default=Settings.vae_minutes)
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="of transformer and text encoders")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="most steps, in each of the two trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=Settings.lr, help="of transformer and text encoders")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=Settings.graphs,
        help="record passes of transformer and text encoders as CUDA graphs",
    )
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="seconds, then save the state and exit 3"
    )
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in ("vae_minutes", "minutes", "steps", "seed", "lr", "graphs")}
    settings = Settings(**given)
    run(MicroConfig(), settings, args.out, args.scratch, time.monotonic() + args.stop_after)


def run(
    config: MicroConfig,
    settings: Settings,
    out: Path,
    scratch: Path,
    stop: float = float("inf"),
    kinds: int | None = None,
) -> None:
    """Everything, with the first `kinds` emoji or all; exits with 3 when `stop` (time.monotonic()) came first."""
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, times sizes, times with and without gradients
    world = World.make(torch.device("cuda" if torch.cuda.is_available() else "cpu"), kinds)
    trained = train(world, config, settings, scratch, stop)
    if trained is None:
        print("stopped; the same command resumes")
        sys.exit(3)
    write(out, *trained, world, settings)


if __name__ == "__main__":
    main()
