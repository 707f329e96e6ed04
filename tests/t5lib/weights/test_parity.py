"""The layers agree with the method's released code: outputs and every gradient, in float64."""

import numpy as np
import pytest
import torch
from parity import CASES, FOLDER, build, grid_of

RELEASED_NAMES = {"q_conv2d": "mixer.q_conv", "k_conv2d": "mixer.k_conv"}


def test_parity_folder_has_cases():
    assert CASES, f"no parity cases in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_layer_agrees_with_the_released_one(path):
    case = {name: torch.from_numpy(value) for name, value in np.load(path).items() if name != "num_heads"}
    layer = build(case, int(np.load(path)["num_heads"]), residual="residual" in path.stem)
    parameters = dict(layer.named_parameters())
    released = {ours(name[len("param.") :]): name[len("param.") :] for name in case if name.startswith("param.")}
    assert set(released) == set(parameters)
    with torch.no_grad():
        for name, theirs in released.items():
            parameters[name].copy_(case[f"param.{theirs}"].reshape(parameters[name].shape))

    x = case["x"].requires_grad_()
    out = layer(x, grid=grid_of(x))
    (out * case["grad_out"]).sum().backward()

    assert relative_error(out, case["out"]) < 1e-10
    assert relative_error(x.grad, case["grad.x"]) < 1e-10
    for name, theirs in released.items():
        expected = case[f"grad.{theirs}"].reshape(parameters[name].shape)
        assert relative_error(parameters[name].grad, expected) < 1e-10, name


def ours(released: str) -> str:
    head, _, rest = released.partition(".")
    if head in RELEASED_NAMES:
        return f"{RELEASED_NAMES[head]}.{rest}"
    return f"mixer.{released}" if head in ("w1", "w2", "w3") else released


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
