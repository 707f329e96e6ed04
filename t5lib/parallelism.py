"""One image drawn by several processes together, which share every pass of the denoiser.

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("rows",))  # of torch.distributed, under torchrun
    t5lib.parallelize(pipe, mesh)

Along "rows" every process has some rows of the image's tokens, and all of the text. A TTT layer then needs little from
the others: its step is a sum over tokens, S·D² numbers per head of width D (S weights take the step); the statistics of
its keys are two numbers per channel; a convolution sees one row above and one below. A softmax layer fetches all keys
and values. Along "batch" every process has some of a pass's latents; with guidance, those with or without the prompt.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from t5kernels.ttt.reference import STEPPED
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.families.diffusers_attention import RowsAttention
from t5lib.families.diffusers_base import DiffusersAdapter
from t5lib.layers.attention import TTTLayer
from t5lib.layers.grid import told_grid
from t5lib.layers.split import Split
from t5lib.layers.ttt_mixer import TTTMixer
from t5lib.utils import processes
from t5lib.utils.errors import T5Error

ROWS, BATCH = "rows", "batch"
CONTROL = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
OF_EACH, OF_ALL = 8, 128  # numbers of one of a pass's inputs that are compared between processes, and of all together
Target = TypeVar("Target")


def parallelize(target: Target, mesh: DeviceMesh | None = None) -> Target:
    """Let several processes draw every image together, in place.

    All of them call `target` with the same inputs, including random generators, and each gets the whole result.

    Args:
        target: a converted pipeline of diffusers, or its transformer, with the same weights in every process, and on a
            device of the process's own. Afterwards it draws and cannot be trained.
        mesh: the processes. Its dimensions are called "rows" (each has some rows of the image), "batch" (each has some
            latents of a pass), or both. None: all processes share rows.

    Returns:
        `target`.

    Raises:
        T5Error: not a converted denoiser, or one that is parallel already; a layer whose work cannot be split; other
            names of dimensions. Later, in a pass: gradients are wanted; inputs differ between processes; there are
            fewer rows of tokens than processes; or the number of latents is no multiple of the processes along "batch".
    """
    model: Any = getattr(target, "transformer", target)
    adapter = _checked(model)
    mesh = mesh or _everyone(next(model.parameters()).device.type)
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - {ROWS, BATCH}:
        raise T5Error(
            f"the mesh has dimensions called {names or None}; expected '{ROWS}', '{BATCH}' or both, such as "
            f"init_device_mesh('cuda', (2, 2), mesh_dim_names=('{BATCH}', '{ROWS}'))"
        )
    model.t5_splits = {name: Split.of(mesh.get_group(name)) for name in names}
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    if BATCH in names:
        model.register_forward_hook(functools.partial(_whole_batch, model.t5_splits[BATCH]))
    if ROWS in names:
        _split_rows(adapter, model, model.t5_splits[ROWS])
    return target


def _everyone(device: str) -> DeviceMesh:
    """A mesh of all processes. Raises T5Error if there is only one."""
    if processes.alone():
        raise T5Error("there is no other process to share with; start several: torchrun --nproc_per_node 4 script.py")
    return init_device_mesh(device, (processes.state().num_processes,), mesh_dim_names=(ROWS,))


def _checked(model: Any) -> DiffusersAdapter:
    """The family of `model`. Raises T5Error unless its passes can be shared."""
    if not isinstance(model, nn.Module):
        raise T5Error(
            f"{type(model).__name__} has no transformer; expected a converted pipeline of diffusers, or its transformer"
        )
    adapter, layers, kind = family_of(model), ttt_layers(model), type(model).__name__
    if not isinstance(adapter, DiffusersAdapter):
        raise T5Error(f"processes cannot share the passes of a {kind}; expected a denoiser of diffusers")
    if not layers:
        raise T5Error(f"this {kind} is not converted; call t5lib.convert, or t5lib.convert_pipeline, first")
    if hasattr(model, "t5_splits"):
        raise T5Error(f"this {kind} is already parallel; load it again to share its passes in another way")
    for name, layer in layers.items():
        config = layer.mixer.config
        if not isinstance(layer.mixer, TTTMixer) or config.inner not in STEPPED:
            raise T5Error(
                f"{name} has the inner model '{config.inner}', whose work cannot be split; expected one of "
                f"{', '.join(STEPPED)}"
            )
    return adapter


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """A hook of `model` before its forward: inputs are checked, and along "batch" split."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        raise T5Error("a parallel model only draws and has no gradients; call it under torch.no_grad()")
    inputs = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if given := [name for name in CONTROL if inputs.get(name) is not None]:
        raise T5Error(f"a parallel model takes no {given[0]}; to draw with a ControlNet, use one process")
    _check_alike(inputs, model.t5_splits.values())
    if BATCH in model.t5_splits:
        inputs = _own_latents(inputs, model.t5_splits[BATCH])
    return (), inputs


def _check_alike(inputs: dict[str, Any], splits: Iterable[Split]) -> None:
    """Raises T5Error, in all processes, unless they have the same inputs; some numbers of each are compared."""
    tensors = [leaf.detach() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = torch.tensor([float(size) for tensor in tensors for size in tensor.shape], device=tensors[0].device)
    some = [tensor.flatten()[:: max(1, tensor.numel() // OF_EACH)][:OF_EACH].float() for tensor in tensors]
    looked_at = torch.cat([sizes, *some, sizes.new_zeros(OF_ALL)])[:OF_ALL]  # as many in every process
    largest, smallest = both = torch.stack([looked_at, -looked_at])
    for split in splits:
        distributed.all_reduce(both, distributed.ReduceOp.MAX, group=split.group)
    if not torch.allclose(largest, -smallest, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise T5Error(
            "processes that draw one image called the model with different inputs; give all of them the same prompt, "
            "size and generator=torch.Generator(device).manual_seed(the same number)"
        )


def _own_latents(inputs: dict[str, Any], split: Split) -> dict[str, Any]:
    """The inputs of this process: its part of every tensor that has one row per latent."""
    count = len(inputs["hidden_states"])
    if count % split.size:
        raise T5Error(
            f"a pass has {count} latents, which {split.size} processes cannot share evenly; draw with guidance or "
            f"several images at once, or give the dimension '{BATCH}' of the mesh another size"
        )
    own = slice(*split.share_of(split.rank, count))
    return tree_map(lambda x: x[own] if isinstance(x, Tensor) and x.ndim and len(x) == count else x, inputs)


def _whole_batch(split: Split, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    """A hook of the model after its forward: the outputs of all processes, joined."""
    part = output[0].contiguous()
    whole = part.new_empty(split.size * len(part), *part.shape[1:])
    distributed.all_gather_into_tensor(whole, part, group=split.group)
    return (whole,) if isinstance(output, tuple) else type(output)(sample=whole)


def _split_rows(adapter: DiffusersAdapter, model: nn.Module, split: Split) -> None:
    """Let the blocks of `model` see only this process's rows."""
    for name in adapter.attention_names(model):
        attention = model.get_submodule(name)
        if isinstance(attention, TTTLayer):
            attention.split = split
        else:
            attention.set_processor(RowsAttention(split, adapter.call_of))
    model.get_submodule(adapter.tokens_from).register_forward_hook(functools.partial(_own_rows, split))
    if adapter.angles_from:
        hook = functools.partial(_own_angles, adapter, split)
        model.get_submodule(adapter.angles_from).register_forward_hook(hook)
    model.get_submodule(adapter.tokens_to).register_forward_hook(functools.partial(_all_rows, split))


def _own_rows(split: Split, _part: nn.Module, _args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    return tokens[:, split.part(told_grid()).tokens]


def _own_angles(adapter: DiffusersAdapter, split: Split, _part: nn.Module, _args: tuple[Any, ...], angles: Any) -> Any:
    return adapter.own_angles(angles, split.part(told_grid()))


def _all_rows(split: Split, _part: nn.Module, _args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    [whole] = split.part(told_grid()).gathered(tokens.unsqueeze(1))
    return whole.squeeze(1)
