"""Cases of the layer, with random inputs, and what an implementation makes of them: outputs and every gradient."""

import functools
from dataclasses import dataclass

import torch
from t5kernels import INNER_WEIGHTS, Grid, RmsNorms, Settings, ttt_layer
from triton_device import DEVICE

USUAL, BARE = Settings(), Settings(key_norm="none")


@dataclass(frozen=True)
class Case:
    images: int = 1
    heads: int = 2
    rows: int = 3
    columns: int = 5
    prefix: int = 1
    after: int = 0
    width: int = 16
    text: int = 0
    conv: bool = True
    rms: bool = False
    rms_eps: float = 1e-6
    settings: Settings = USUAL

    @property
    def weight_names(self):
        return [f"w{i + 1}" for i in range(INNER_WEIGHTS[self.settings.inner])]

    @property
    def sides(self):
        """What the names of leaves begin with: nothing for the image's."""
        return ["", "text_"] if self.text else [""]

    def __str__(self):
        settings = self.settings
        kind = f"{settings.inner}-{settings.key_norm}-{settings.norm_scope}" + ("" if self.conv else "-no conv")
        kind += "-rms" if self.rms else ""
        size = f"B{self.images}-{self.rows}x{self.columns}+{self.prefix}+{self.after}-H{self.heads}-D{self.width}"
        return f"{size}-T{self.text}-{kind}"


# Everything at once; most tests of the kernels share its results.
FULL = Case(text=7, after=2, width=24, rms=True)
TINY = Case(heads=1, rows=2, columns=4, text=3)
# For tests that run an op many times.
LEAST = Case(heads=1, rows=2, columns=2, prefix=0, text=2, width=8, rms=True)


@dataclass
class Inputs:
    """Leaves by name, and the gradients of the outputs."""

    leaves: dict
    d_outs: tuple

    def map(self, change):
        return Inputs({name: change(t) for name, t in self.leaves.items()}, tuple(map(change, self.d_outs)))


def draw(case, dtype=torch.float32, seed=0):
    """Tokens are views of one projection; keys have a shift and outliers, as those of pretrained models have."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    H, D, B = case.heads, case.width, case.images

    def tokens(count):
        qkv = normal(B, count, 3, H, D)
        qkv[:, :, 1] += 2 * normal(H, D)
        qkv[:, 5::17, 1, :, ::11] *= 4
        return qkv.to(dtype).transpose(1, 3).unbind(2)

    count = case.rows * case.columns + case.prefix + case.after
    leaves = dict(zip(("q", "k", "v"), tokens(count), strict=True))
    if case.text:
        leaves |= dict(zip(("text_q", "text_k", "text_v"), tokens(case.text), strict=True))
    leaves |= {name: (normal(H, D, D) * D**-0.5).to(dtype) for name in case.weight_names}
    if case.conv:
        for name in ("q", "k"):
            leaves[f"{name}_weight"] = (normal(H * D, 1, 3, 3) * 0.2).to(dtype)
            leaves[f"{name}_bias"] = (normal(H * D) * 0.2).to(dtype)
    if case.rms:
        for side in case.sides:
            leaves |= {f"{side}{name}_gain": (1 + 0.3 * normal(D)).to(dtype) for name in "qk"}
    d_outs = tuple(normal(B, n, H, D).to(dtype).transpose(1, 2) for n in (count, case.text) if n)
    return Inputs(leaves, d_outs)


def call(case, leaves, impl, op=ttt_layer):
    """The outputs of image and, if any, text."""
    tokens = tuple(leaves[name] for name in "qkv")
    text = tuple(leaves[f"text_{name}"] for name in "qkv") if case.text else None
    convs = {f"{n}_conv": (leaves[f"{n}_weight"], leaves[f"{n}_bias"]) for n in "qk"} if case.conv else {}
    gains = [tuple(leaves[f"{side}{n}_gain"] for n in "qk") for side in case.sides if case.rms]
    norms = RmsNorms(*gains, eps=case.rms_eps) if case.rms else None
    grid = Grid(rows=case.rows, columns=case.columns, num_prefix_tokens=case.prefix)
    weights = tuple(leaves[name] for name in case.weight_names)
    outs = op(tokens, weights, case.settings, grid=grid, text=text, impl=impl, norms=norms, **convs)
    return outs if case.text else outs[:1]


def results(case, inputs, impl, op=ttt_layer):
    """The outputs and every gradient, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.leaves.items()}
    outs = call(case, leaves, impl, op)
    gradients = torch.autograd.grad(outs, list(leaves.values()), inputs.d_outs)
    # A convolution's weights are compared as a whole: they have no heads.
    flat = (g.flatten() if name.endswith("weight") else g for name, g in zip(leaves, gradients, strict=True))
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | {
        f"d_{name}": g for name, g in zip(leaves, flat, strict=True)
    }


@functools.cache
def kernel_results(case, dtype):
    """The kernels' results on drawn inputs, computed once for all tests: the interpreter is slow."""
    return results(case, draw(case, dtype), "triton")
