"""What a pretrained sd35-micro is: quick scores of its pictures, a sheet of samples, and the model card.

The scores need no other model. A picture of one emoji is compared, pixel by pixel, with the composed picture of every
emoji on the same background: is the nearest the right one? And the colour of its border: is the asked-for background
the nearest?
"""

from pathlib import Path

import torch
from captions import COLOURS, caption
from jinja2 import Template
from PIL import Image
from scenes import Scenes, compose, to_bytes
from torch import Tensor
from vocabulary import LENGTH

from t5lib.evaluation.generation import GenerateConfig, sample

GUIDANCE = 4.0
STEPS = 28
BORDER = 3  # pixels at 64 px
SHOWN = (
    "a red apple on a blue background",
    "two cats on a yellow background",
    "three tropical fish, black background",
    "green background with four mushrooms",
    "a picture of a hamburger on pink",
    "two soccer balls on a gray background",
    "white background with one rooster",
    "three cupcakes on a red background",
)


def load(folder: Path, device: torch.device):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder).to(device)


def generate(pipeline, prompts: list[str], size: int, seed: int) -> Tensor:
    """(B, 3, size, size) in [-1, 1]."""
    options = {"guidance": GUIDANCE, "steps": STEPS, "size": (size, size), "max_sequence_length": LENGTH}
    made = sample(
        pipeline, prompts, [seed + index for index in range(len(prompts))], GenerateConfig(batch_size=64, **options)
    )
    return made / 127.5 - 1


def single_scenes(emoji: Tensor, colour: Tensor) -> Scenes:
    """One unmoved copy each."""
    one = torch.ones_like(emoji)
    moves = torch.tensor([0.0, 0.0, 0.96]).expand(len(emoji), 4, 3)
    return Scenes(emoji=emoji, count=one, colour=colour, phrasing=0 * one, moves=moves)


def scores(folder: Path, world, prompts: int, seed: int, size: int = 64) -> dict[str, float]:
    """Share of pictures (0 to 1) whose emoji is nearest, or of the nearest five, and whose background is right."""
    if not prompts:
        return {}
    pipeline = load(folder, world.device)
    chance = torch.Generator().manual_seed(seed)
    emoji = torch.randint(len(world.kinds), (prompts,), generator=chance)
    colour = torch.randint(len(COLOURS), (prompts,), generator=chance)
    asked = [caption(world.kinds[e].name, 1, list(COLOURS)[c], 0) for e, c in zip(emoji, colour, strict=True)]
    made = generate(pipeline, asked, size, seed).to(world.device)
    place = torch.empty(prompts, dtype=torch.long)
    for index, picture in enumerate(made):
        every = torch.arange(len(world.kinds))
        references = compose(world.sprites, single_scenes(every, colour[index].expand(len(every))), size)
        error = (references - picture).square().mean(dim=(1, 2, 3))
        place[index] = (error < error[emoji[index]]).sum()
    found = backgrounds(made)
    return {
        "prompts": prompts,
        "size": size,
        "emoji_at_1": float((place == 0).float().mean()),
        "emoji_at_5": float((place < 5).float().mean()),
        "background": float((found == colour).float().mean()),
    }


def backgrounds(pictures: Tensor) -> Tensor:
    """(B,) the number of the background whose colour is nearest to the median of each border, on the CPU."""
    width = BORDER * pictures.shape[-1] // 64
    edges = [pictures[..., :width, :], pictures[..., -width:, :], pictures[..., :width], pictures[..., -width:]]
    border = torch.cat([edge.flatten(2) for edge in edges], -1).median(-1).values.cpu()
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    return torch.cdist(border, palette).argmin(1)


def samples(folder: Path, device: torch.device) -> Image.Image:
    """The prompts of SHOWN, at 128 px, four a row."""
    made = to_bytes(generate(load(folder, device), list(SHOWN), 128, 0))
    sheet = Image.new("RGB", (4 * 128, len(made) // 4 * 128))
    for index, picture in enumerate(made):
        sheet.paste(Image.fromarray(picture), (index % 4 * 128, index // 4 * 128))
    return sheet


def text(facts: dict) -> str:
    """The model card, from what pretrain.py noted."""
    template = Template((Path(__file__).parent / "card.md.j2").read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(facts, shown=SHOWN, length=LENGTH, guidance=GUIDANCE, denoising_steps=STEPS)
