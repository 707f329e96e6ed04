"""Converted layers that differ only in their heads, fitted as one mixer (t5lib.training.calibration).

Shapes: B images, L layers, H heads, N image tokens, T text tokens (of a joint attention, after the image's), D head
width, C channels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from t5lib.families.base import Adapter, AttentionCall
from t5lib.layers.attention import TTTLayer
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer
from t5lib.training.checkpoints import Kept
from t5lib.utils import processes
from t5lib.utils.config import AtLeastOne, BatchSize, Rate, Repeats, WholeNumber, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.processes import Part

Example = tuple[Tensor, ...]
TOGETHER = 2**26  # images × tokens × channels × layers that a step goes through at once: more only take more memory


@settings
class CalibrateConfig:
    """How the new layers are fitted.

    Attributes:
        steps: optimizer steps; 0 skips calibration.
        batch_size: images a step, of all processes together.
        lr: peak learning rate of the new weights (Adam); linear warm-up over `warmup` steps, then cosine to 0.
        lr_inherited: peak learning rate of the q, k and v projections and q and k norms, which are fitted along; 0
            keeps them as they are, at the price of a larger error (docs/results).
        pool: batches of teacher activations held at once; steps draw their images from this pool. What one image
            takes is about 2·L·N·C numbers: half a gigabyte for the paper's layers of SD3.5-Medium at 1024 px.
        reuse: how often each image of a pool is used before the pool is replaced.
        checkpoint_every: steps between checkpoints.
        checkpoints_kept: how many of them are kept: 2, in case a disk damages the newest. With 0 none is written, and
            an interrupted fit starts over, or from an older checkpoint if there is one.
        objective: "output" (squared error of the layer's output over its variance), or "attention" (cross-entropy to
            the softmax map, as Hedgehog does, arXiv 2402.04347; for mixers that have a map, at quadratic cost).
        compile: torch.compile the fitting step; null does so on CUDA, in one process, for 500 steps or more.
        seed: the order in which images are drawn from a pool.
    """

    steps: WholeNumber = 5000
    batch_size: BatchSize = 64
    lr: Annotated[Rate, Field(gt=0)] = 1e-2
    lr_inherited: Rate = 1e-3
    warmup: WholeNumber = 50
    pool: Repeats = 4
    reuse: Repeats = 2
    checkpoint_every: AtLeastOne = 500
    checkpoints_kept: Kept = 2
    objective: Literal["output", "attention"] = "output"
    compile: bool | None = None
    seed: WholeNumber = 0


def check_fit(config: CalibrateConfig, mixers: Sequence[Mixer]) -> None:
    """Raises T5Error unless layers with these mixers can be fitted so."""
    if not config.lr_inherited and not any(list(mixer.parameters()) for mixer in mixers):
        raise T5Error(
            "these layers have no new weights, so with lr_inherited 0 there is nothing to fit; set "
            "calibrate.lr_inherited, or skip calibration (steps: 0)"
        )
    if config.objective == "attention":
        for mixer in mixers:
            _check_maps(mixer)


def _check_maps(mixer: Mixer) -> None:
    settings = mixer.config
    if not hasattr(mixer, "attention_map"):
        raise T5Error(
            f"calibrate: objective 'attention' needs a mixer with an attention map, and inner '{settings.inner}' "
            "has none; use objective 'output'"
        )
    if settings.rescale or (settings.key_norm, settings.locality) != ("none", "none"):
        raise T5Error(
            f"calibrate: objective 'attention' compares maps of the projections as they are, but key_norm is "
            f"'{settings.key_norm}', locality '{settings.locality}' and rescale {settings.rescale}; set them to "
            "'none', 'none' and false, or use objective 'output'"
        )
    if settings.text == "exact":
        raise T5Error(
            "calibrate: objective 'attention' compares one map over image and text, and with text 'exact' there are "
            "two; use objective 'output'"
        )


@dataclass(frozen=True)
class Places:
    """Where the tokens of images of one size lie, for the layers of a group.

    Attributes:
        grid: of the image's tokens.
        ropes: for each layer, in order, the rotary table that its attention is called with, or None.
    """

    grid: TokenGrid
    ropes: tuple[Tensor | None, ...]


class Seen:
    """What attentions of a softmax model got and gave in one run, by name (Adapter.watch), and where the image's
    tokens lie in it."""

    def __init__(self, grid: TokenGrid):
        self.grid = grid
        self.calls: dict[str, AttentionCall] = {}
        self.outputs: dict[str, Tensor] = {}

    def places(self, names: Iterable[str]) -> Places:
        return Places(self.grid, tuple(self.calls[name].rope for name in names))

    def kind_of(self, name: str, layer: TTTLayer) -> tuple:
        """Layers for which this is equal can be fitted as one mixer, at any size of the image."""
        tokens, output = self.calls[name].tokens, self.outputs[name]
        drops_text = output.shape[1] < sum(part.shape[1] for part in tokens)
        channels = tuple(part.shape[2] for part in tokens)
        return layer.mixer.config, layer.num_heads, layer.head_dim, channels, drops_text

    def numbers(self, name: str) -> int:
        """Tokens × channels of an image that an attention got."""
        return sum(part[0].numel() for part in self.calls[name].tokens)


class LayerGroup:
    """Layers of one kind, fitted as one mixer of L·H heads.

    An example is a tuple: inputs x (B, L, N, C), in a joint attention the text's (B, L, T, C), softmax outputs
    (B, L, N + T, H·D) or, where text is dropped, (B, L, N, H·D), and for the objective "attention" the teacher's q and
    k (B, L·H, N + T, D). Where neither projections nor inputs are trained, the inputs are left out and the layers' q,
    k and v (B, L·H, N + T, D) come first.

    Args:
        layers: by name, for all of which Seen.kind_of is the same.
        parts: 2 for joint attention, 1 for image tokens alone.
        sources: the softmax attentions, by the same names.
        config: of the calibration.
        compiled: whether `loss` is.
    """

    def __init__(
        self,
        family: Adapter,
        layers: dict[str, TTTLayer],
        sources: dict[str, nn.Module],
        parts: int,
        config: CalibrateConfig,
        device: torch.device,
        compiled: bool,
    ):
        first = next(iter(layers.values()))
        self.family, self.layers, self.sources, self.parts = family, layers, sources, parts
        self.members = list(layers.values())  # what is compiled sees no names, so that groups of one kind share it
        self.objective = config.objective
        settings = first.mixer.config
        self.mixer = make_mixer(first.num_heads, first.head_dim, settings, len(layers)).to(device)
        self.projected = not config.lr_inherited and settings.convolution != "cpe"
        self.copy(to_layers=False)
        self.loss = self._attention_loss if config.objective == "attention" else self.error
        if compiled:
            self.loss = torch.compile(self.loss)

    def examples(self, seen: Seen) -> Example:
        """All that a run of the teacher gives to learn from."""
        target = torch.stack([seen.outputs[name] for name in self.layers], dim=1)
        tokens = zip(*(seen.calls[name].tokens for name in self.layers), strict=True)
        # autocast would narrow them in every step
        x = tuple(torch.stack([each.to(target.dtype) for each in part], dim=1) for part in tokens)
        known = self._project(x, seen.places(self.layers)) if self.projected else x
        if self.objective == "output":
            return *known, target
        maps = [self.family.project(self.sources[name], seen.calls[name])[:2] for name in self.layers]
        return *known, target, *(torch.cat(part, dim=1) for part in zip(*maps, strict=True))

    def variances(self, places: Places, example: Example, part: Part) -> Example:
        """The variance of each layer's target, (L,): of its image tokens and, where it has text, of that.

        Args:
            part: of the images that the variance is of, that `example` holds.
        """
        target = example[3 if self.projected else self.parts].float()
        border = places.grid.patches.stop
        kinds = [target[:, :, :border], target[:, :, border:]]
        return tuple(processes.variance(kind, (0, 2, 3), part) for kind in kinds if kind.shape[2])

    def error(self, places: Places, variances: Example, *example: Tensor) -> Tensor:
        """Squared error of each layer's heads over the variance of its target (`variances`), (L,).

        Image and text have a variance each, and count as many times as they have tokens.
        """
        grid = places.grid
        (q, k, v), (target, *_) = self._split(example, places)
        o = self.mixer(q, k, v, self._layout(q, grid))
        B, _, N, D = o.shape
        o = o.view(B, len(self.members), -1, N, D).transpose(2, 3).flatten(3).float()
        target = target.float()
        image, tokens = grid.patches.stop, target.shape[2]
        error = _squared_error(o[:, :, :image], target[:, :, :image]) / variances[0]
        if image == tokens:
            return error
        text = _squared_error(o[:, :, image:], target[:, :, image:]) / variances[1]
        return torch.lerp(error, text, 1 - image / tokens)

    def _attention_loss(self, places: Places, variances: Example, *example: Tensor) -> Tensor:
        """Cross-entropy from the teacher's softmax map to the mixer's map, mean over heads and queries, (L,)."""
        (q, k, _), (_, teacher_q, teacher_k) = self._split(example, places)
        wanted = (teacher_q.float() * teacher_q.shape[-1] ** -0.5 @ teacher_k.float().mT).softmax(-1)
        ours = self.mixer.attention_map(q, k).float().clamp_min(1e-8)
        return -(wanted * ours.log()).sum(-1).unflatten(1, (len(self.members), -1)).mean(dim=(0, 2, 3))

    def _split(self, example: Example, places: Places) -> tuple[Example, Example]:
        """The layers' q, k, v, and what is to be matched."""
        if self.projected:
            return example[:3], example[3:]
        return self._project(example[: self.parts], places), example[self.parts :]

    def _project(self, x: tuple[Tensor, ...], places: Places) -> Example:
        """x (B, L, N, C), and perhaps the text's (B, L, T, C), to q, k, v, each (B, L·H, N + T, D)."""
        image, *text = x
        together = image.transpose(1, 2).flatten(2)  # the layers' channels side by side, as the stacked mixer has them
        prepared = self.mixer.prepare(together, places.grid).unflatten(2, (len(self.members), -1))
        made = []
        for index, (layer, rope) in enumerate(zip(self.members, places.ropes, strict=True)):
            tokens = (prepared[:, :, index], *(part[:, index] for part in text))
            made.append(self.family.project(layer, AttentionCall(tokens, rope)))
        return tuple(torch.cat(part, dim=1) for part in zip(*made, strict=True))

    def _layout(self, q: Tensor, grid: TokenGrid) -> TokenGrid:
        """Of q's tokens, text included; `grid` is the image's."""
        return grid if self.parts == 1 else grid.with_suffix(q.shape[2] - grid.patches.stop)

    @torch.no_grad()
    def copy(self, *, to_layers: bool) -> None:
        """Between the layers' mixers and the one whose heads are all of theirs, in order."""
        own = [_tensors(layer.mixer) for layer in self.layers.values()]
        for name, whole in _tensors(self.mixer).items():
            for part, tensors in zip(whole.chunk(len(own)), own, strict=True):
                source, destination = (part, tensors[name]) if to_layers else (tensors[name], part)
                destination.copy_(source)


def _squared_error(o: Tensor, target: Tensor) -> Tensor:
    """Mean of each layer, (B, L, tokens, H·D) to (L,)."""
    return (o - target).square().mean(dim=(0, 2, 3))


def _tensors(mixer: nn.Module) -> dict[str, Tensor]:
    return dict(mixer.named_parameters()) | dict(mixer.named_buffers())
