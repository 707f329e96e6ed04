"""Passes of denoisers that several processes share, each to be compared with the pass of one process."""

import copy
from typing import Any

import numpy as np
import torch
from tiny_denoisers import TEXT, tiny_dit, tiny_flux, tiny_pixart, tiny_qwen_image, tiny_sd3
from tiny_pipelines import tiny_sd3_pipeline
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import t5lib
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.utils import processes
from t5lib.utils.errors import T5Error

MAKERS = {"sd3": tiny_sd3, "dit": tiny_dit, "pixart": tiny_pixart, "flux": tiny_flux, "qwen_image": tiny_qwen_image}
HEIGHT, WIDTH = 10, 12  # latents: 5 rows of tokens, which neither two nor three processes share evenly
SEED = 7


def converted(family: str, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose new weights are all random, and inputs of a pass, two latents; the same in every process."""
    height, width = (HEIGHT, HEIGHT) if family == "dit" else (HEIGHT, WIDTH)  # which draws squares alone
    model = MAKERS[family]()
    adapter, draw = family_of(model), torch.Generator().manual_seed(SEED)
    size = {"timestep": torch.tensor([300.0, 300.0]), "class_labels": torch.tensor([1, 2])}
    wide = {"T": TEXT}
    inputs = {"hidden_states": torch.randn(2, adapter.in_channels(model), height, width, generator=draw)}
    for name, sizes in adapter.conditions(model).items():
        random = torch.randn(2, *(wide.get(each, each) for each in sizes), generator=draw)
        inputs[name] = size.get(name, random)
    if family == "qwen_image":
        inputs["encoder_hidden_states_mask"] = torch.tensor([[True] * TEXT, [True] * (TEXT - 1) + [False]])
    model = t5lib.convert(model, TTTConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model, inputs


def one_pass(model: nn.Module, inputs: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        return family_of(model).call(model, inputs).numpy()


def mesh_of(number: int) -> DeviceMesh | None:
    """A mesh of the first so many processes, for those that are in it; None for all of them."""
    state = processes.state()
    if number == state.num_processes:
        return None
    group = distributed.new_group(list(range(number)))
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("rows",)) if state.process_index < number else None


def shared_rows(number: int, family: str, config: dict[str, Any]) -> np.ndarray | None:
    """What a pass gives whose rows the first so many processes share; None in the others."""
    mesh = mesh_of(number)
    if processes.state().process_index >= number:
        return None
    model, inputs = converted(family, config)
    return one_pass(t5lib.parallelize(model, mesh), inputs)


def picture(names: tuple[str, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """Latents that a pipeline draws with guidance in the processes of such a mesh; without names in each by itself."""
    pipe = t5lib.convert_pipeline(tiny_sd3_pipeline(t5=False), TTTConfig(layers={"0-1": "softmax", "2-4": "t5+"}))
    pipe.set_progress_bar_config(disable=True)
    if names:
        processes.state()
        t5lib.parallelize(pipe, init_device_mesh("cpu", sizes, mesh_dim_names=names))
    seed, size = torch.Generator().manual_seed(SEED), {"height": 20, "width": 20}
    options = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False, "max_sequence_length": 8}
    return pipe("a fox", generator=seed, **size, **options)[0].numpy()


def refused() -> dict[str, str]:
    """What is refused in a group of two, and with which message."""
    state, found = processes.state(), {}
    model, inputs = converted("sd3", {})

    def attempt(what: str, names: tuple[str, ...], change: dict[str, Tensor], again: bool = False) -> None:
        try:
            shared = copy.deepcopy(model)
            for _ in range(1 + again):
                t5lib.parallelize(shared, init_device_mesh("cpu", (state.num_processes,), mesh_dim_names=names))
            one_pass(shared, inputs | change)
        except T5Error as error:
            found[what] = str(error)

    attempt("names", ("columns",), {})
    attempt("twice", ("rows",), {}, again=True)
    attempt("noise", ("rows",), {"hidden_states": inputs["hidden_states"] + state.process_index})
    attempt("few rows", ("rows",), {"hidden_states": inputs["hidden_states"][:, :, :2]})
    attempt("odd batch", ("batch",), {name: value[:1] for name, value in inputs.items()})
    attempt("control", ("rows",), {"block_controlnet_hidden_states": [torch.zeros(2, 30, 16)]})
    shared = t5lib.parallelize(model)
    later = {"gradients": lambda: family_of(shared).call(shared, inputs), "revert": lambda: t5lib.revert(shared)}
    for what, call in later.items():
        try:
            call()
        except T5Error as error:
            found[what] = str(error)
    return found
