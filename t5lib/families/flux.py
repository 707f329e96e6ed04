"""Flux.1 in diffusers, dev and schnell: FluxTransformer2DModel with TTT layers, still an ordinary diffusers model.

The first blocks have a joint attention with projections of their own for image and text. The single blocks after them
hold both in one sequence, text first, and compute the MLP beside the attention. All attentions are joint, and rotate
queries and keys. In the numbering of TTTConfig.layers those of the single blocks come last.

A forward is told where its tokens lie by `img_ids`, a row (image, row, column) a token, from which the grid is read.
"""

import functools
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, ModelMixin  # ModelMixin: from_pretrained of a pipeline looks for it here
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from t5lib.families.base import AttentionCall
from t5lib.families.diffusers_base import ConvertedModel, converting_init
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.families.packed_latents import (
    GUIDANCE,
    PackedLatentsAdapter,
    RotaryJointTTTAttention,
    image_and_text,
    telling_its_grid,
)
from t5lib.layers.grid import TokenGrid, current_grid
from t5lib.layers.split import RowsOfGrid
from t5lib.utils.errors import T5Error
from t5lib.utils.threads import of_this_thread

__all__ = ["ADAPTER", "DEV", "ModelMixin", "T5FluxTransformer2DModel"]

DEV: dict[str, Any] = {"guidance_embeds": True}  # arguments of FluxTransformer2DModel as Flux.1-dev has them
BLOCKS = {"transformer_blocks": FluxTransformerBlock, "single_transformer_blocks": FluxSingleTransformerBlock}


class _KnownGrid(NamedTuple):
    """The grid that `grid_of` read from a tensor of ids, and the tensor's version at that time."""

    version: int
    sides: tuple[int, int]


_known = WeakTensorKeyDictionary()  # _KnownGrid by the tensor itself


@functools.lru_cache(maxsize=16)
def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """The ids (N, 3) of the tokens of one image: 0, row, column. The tensor is cached; do not change it."""
    with torch.inference_mode(False):
        sides = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack((torch.zeros_like(sides[0]), *sides), dim=-1).flatten(0, 1).float().to(device)


@torch.compiler.disable(
    reason="a converted Flux reads its grid off img_ids, which a graph cannot; compile its blocks: "
    "transformer.compile_repeated_blocks(fullgraph=True), or leave fullgraph out"
)
def grid_of(ids: Tensor | None) -> tuple[int, int]:
    """Rows and columns of the image whose tokens have these ids, (N, 3) or, as once, (B, N, 3).

    A pipeline passes the same tensor in every step. It is read only once, because reading waits for the card and cannot
    be part of a CUDA graph.

    Raises:
        T5Error: they are not those of one image, row by row.
    """
    if ids is None:
        raise T5Error("a converted Flux is called without img_ids, which give its grid; pass them as the pipeline does")
    version = 0 if ids.is_inference() else ids._version  # an inference tensor counts no changes
    known = _known.get(ids)
    if known is None or known.version != version:
        known = _known[ids] = _KnownGrid(version, _read_grid(ids))
    return known.sides


def _read_grid(ids: Tensor) -> tuple[int, int]:
    own = (ids[0] if ids.ndim == 3 else ids).cpu()
    columns = int((own[:, 1] == 0).cumprod(0).sum())  # 1 and more are not 0 in any precision
    grid = TokenGrid(len(own) // max(columns, 1), columns)
    expected = image_ids(grid.rows, grid.columns, own.device).to(own.dtype)
    if not torch.equal(own, expected):
        at = next((i for i, (a, b) in enumerate(zip(own, expected, strict=False)) if not a.equal(b)), len(expected))
        raise T5Error(
            f"img_ids are not those of one image row by row: the id of token {at} is {own[at].tolist()}. A converted "
            "Flux draws one image and sees no others beside it (Kontext, several references); use the softmax pipeline "
            "for those (t5lib.revert of the transformer)"
        )
    return grid.rows, grid.columns


class FluxTTTAttention(RotaryJointTTTAttention):
    """The layer that replaces a FluxAttention. The angles are cosines and sines (T + N, D) each, text first."""

    @staticmethod
    def table(angles: tuple[Tensor, Tensor], tokens: int) -> Tensor:
        cosines, sines = angles
        text = cosines.shape[0] - tokens
        return torch.cat((sines, cosines), dim=-1).roll(-text, dims=0)

    @staticmethod
    def angles(table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        sines, cosines = table.roll(-tokens, dims=0).chunk(2, dim=-1)
        return cosines, sines

    @staticmethod
    def own_angles(angles: tuple[Tensor, Tensor], grid: RowsOfGrid) -> tuple[Tensor, Tensor]:
        text = angles[0].shape[0] - grid.total * grid.columns
        cosines, sines = (torch.cat((each[:text], each[text:][grid.tokens])) for each in angles)
        return cosines, sines


class T5FluxTransformer2DModel(ConvertedModel, FluxTransformer2DModel):  # type: ignore[misc]  # diffusers' own bases differ
    """A FluxTransformer2DModel with TTT layers; t5lib.convert makes them, from_pretrained and pipelines load them."""

    __init__ = converting_init(FluxTransformer2DModel, lambda: ADAPTER)
    forward = telling_its_grid(FluxTransformer2DModel.forward, "img_ids", grid_of, *BLOCKS)


class Flux(PackedLatentsAdapter):
    """Flux.1."""

    name = "flux"
    softmax_class = FluxTransformer2DModel
    converted_class = T5FluxTransformer2DModel
    attention_class = FluxAttention
    layer_class = FluxTTTAttention
    processors = (FluxAttnProcessor,)
    tokens_from = "x_embedder"
    mlps = ("ff", "ff_context", "proj_mlp")  # the MLP's way out of a single block is the attention's too, and is kept

    def conditions(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        guidance = {"guidance": ()} if model.config.guidance_embeds else {}
        return {
            "timestep": (),
            "encoder_hidden_states": ("T", model.config.joint_attention_dim),
            "pooled_projections": (model.config.pooled_projection_dim,),
            **guidance,
        }

    def check_blocks(self, model: nn.Module) -> None:
        for name, kind in BLOCKS.items():
            for index, block in enumerate(getattr(model, name)):
                if not isinstance(block, kind):
                    raise T5Error(f"{name}.{index} is {type(block).__name__}; expected {kind.__name__}")

    def attention_names(self, model: nn.Module) -> list[str]:
        """The attentions of the joint blocks, then those of the single ones."""
        return [f"{name}.{index}.attn" for name in BLOCKS for index, _ in enumerate(getattr(model, name))]

    def layer_sets(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """No smaller set is published or measured; "auto" measures one."""
        return {"all": tuple(range(len(self.attention_names(model))))}

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        return list(chain(*self.block_lists(model)))

    def block_lists(self, model: nn.Module) -> list[nn.ModuleList]:
        return [getattr(model, name) for name in BLOCKS]

    def is_joined(self, attention: nn.Module) -> bool:
        return getattr(attention, "add_k_proj", None) is None

    def places(self, inputs: Inputs, grid: TokenGrid) -> dict[str, Any]:
        latents, text = inputs[self.input_name], inputs["encoder_hidden_states"]
        ids = image_ids(grid.rows, grid.columns, latents.device)
        return {"img_ids": ids, "txt_ids": text.new_zeros(text.shape[1], 3)}

    def watch(
        self, attention: nn.Module, calls: dict[str, AttentionCall], outputs: dict[str, Tensor], name: str
    ) -> list[RemovableHandle]:
        """See Adapter; the attention of a single block has no output projection, what it gives are its heads."""
        if not self.is_joined(attention):
            return super().watch(attention, calls, outputs, name)

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
            calls[name] = self.call_of(*arguments, **named)
            outputs[name] = torch.cat(image_and_text(output, current_grid()), dim=1)

        return [attention.register_forward_hook(of_this_thread(keep), with_kwargs=True)]

    def example_conditions(self, model: nn.Module, size: ExampleSize, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(size.batch, *shape, generator=generator)

        text = normal(size.text_tokens, model.config.joint_attention_dim)
        given = {"encoder_hidden_states": text, "pooled_projections": normal(model.config.pooled_projection_dim)}
        return given | ({"guidance": torch.full((size.batch,), GUIDANCE)} if model.config.guidance_embeds else {})


ADAPTER: Flux = Flux()
