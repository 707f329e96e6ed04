"""The cases that kernels are measured and tuned on: layers of real models, with inputs as projections give them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t5kernels.ttt.api import INNER_WEIGHTS
from t5kernels.ttt_layer.api import Grid, Settings, ttt_layer


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: instance norm of the keys, convolved queries and keys, an inner model.

    Attributes:
        images, rows, columns, heads, width: batch, sides of the token grid, heads and head width.
        prefix: tokens before the grid.
        text: tokens beside the image, as in joint attention.
        inner: the inner model.
        targets: by figure, what must be reached on one H200 in bfloat16 and what is aimed at (None: no more than that).
            Figures are milliseconds, and for "memory" the peak of a training step beyond inputs and outputs, in tensors
            of the tokens' size.
    """

    name: str
    images: int
    rows: int
    columns: int
    heads: int
    width: int
    prefix: int = 0
    text: int = 0
    inner: str = "swiglu"
    targets: dict[str, tuple[float, float | None]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The layer's."""
        return Settings(inner=self.inner)

    @property
    def weight_names(self) -> list[str]:
        """Those of the inner weights."""
        return [f"w{i + 1}" for i in range(INNER_WEIGHTS[self.inner])]

    @property
    def tokens(self) -> int:
        """Tokens of an image, without text."""
        return self.rows * self.columns + self.prefix

    @property
    def elements(self) -> int:
        """Elements of one B·N·C tensor, text included."""
        return self.images * (self.tokens + self.text) * self.heads * self.width

    def __str__(self) -> str:
        text = f"+{self.text}" if self.text else ""
        return f"{self.name}: {self.inner}, {self.images} x {self.tokens}{text} tokens, {self.heads} x {self.width}"


CASES = (
    Case(
        name="n4096", images=2, rows=64, columns=64, heads=24, width=64,
        targets={"forward_ms": (0.100, None), "both_ms": (0.43, None)},
    ),
    Case(
        name="n16384", images=2, rows=128, columns=128, heads=24, width=64,
        targets={"forward_ms": (0.31, None), "both_ms": (1.30, None), "memory": (1.5, None)},
    ),
    Case(
        name="n4096-last", images=2, rows=64, columns=64, heads=24, width=64, inner="swiglu_last",
        targets={"forward_ms": (0.085, None), "both_ms": (0.33, None)},
    ),
    Case(
        name="n16384-last", images=2, rows=128, columns=128, heads=24, width=64, inner="swiglu_last",
        targets={"forward_ms": (0.26, None), "both_ms": (1.0, None), "memory": (1.5, None)},
    ),
    Case(
        name="n4096-linear", images=2, rows=64, columns=64, heads=24, width=64, inner="linear_proj_qk",
        targets={"forward_ms": (0.085, None), "both_ms": (0.33, None)},
    ),
    Case(
        name="n16384-linear", images=2, rows=128, columns=128, heads=24, width=64, inner="linear_proj_qk",
        targets={"forward_ms": (0.26, None), "both_ms": (1.0, None), "memory": (1.5, None)},
    ),
    Case(name="sd35-joint", images=2, rows=64, columns=64, heads=24, width=64, text=333),
    Case(
        name="flux", images=2, rows=64, columns=64, heads=24, width=128, text=512,
        targets={"forward_ms": (0.45, 0.34), "both_ms": (2.0, 1.5)},
    ),
    Case(name="vit-s", images=128, rows=14, columns=14, prefix=1, heads=6, width=64),
    Case(
        name="so400m",  # DiT-XL at 512 px has the same shape
        images=16, rows=32, columns=32, heads=16, width=72,
        targets={"forward_ms": (0.32, 0.26), "both_ms": (1.3, 1.0)},
    ),
    Case(name="so400m-4096", images=2, rows=64, columns=64, heads=16, width=72),
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, by name, and the gradients of the outputs.

    q, k, v and text_q, text_k, text_v (B, H, N, D) are views of one projection each; w1, w2 and, for most inner
    models, w3 (H, D, D); q_weight, k_weight (H·D, 1, 3, 3) and q_bias, k_bias (H·D,) of the convolutions.
    """

    case: Case
    leaves: dict[str, Tensor]
    d_outs: tuple[Tensor, ...]

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> "Inputs":
        """Random inputs. Keys have a shift and outliers, as those of pretrained models have."""
        generator = torch.Generator(device).manual_seed(0)
        B, H, D = case.images, case.heads, case.width

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def projected(count: int) -> tuple[Tensor, ...]:
            qkv = normal(B, count, 3, H, D)
            qkv[:, :, 1] += 2 * normal(H, D)
            qkv[:, 5::17, 1, :, ::11] *= 4
            return qkv.to(dtype).transpose(1, 3).unbind(2)

        counts = [case.tokens] + [case.text] * bool(case.text)
        names = ("q", "k", "v", "text_q", "text_k", "text_v")
        leaves = dict(zip(names, (t for count in counts for t in projected(count)), strict=False))
        leaves |= {name: (normal(H, D, D) * D**-0.5).to(dtype) for name in case.weight_names}
        for name in "qk":
            leaves[f"{name}_weight"] = (normal(H * D, 1, 3, 3) * 0.2).to(dtype)
            leaves[f"{name}_bias"] = (normal(H * D) * 0.2).to(dtype)
        d_outs = tuple(normal(B, count, H, D).to(dtype).transpose(1, 2) for count in counts)
        return cls(case, {name: t.detach().requires_grad_() for name, t in leaves.items()}, d_outs)

    def double(self) -> "Inputs":
        """The same in float64."""
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        return Inputs(self.case, leaves, tuple(d.double() for d in self.d_outs))

    def layer(self, impl: str, **leaves: Tensor) -> tuple[Tensor, ...]:
        """The outputs of image and, if any, text: of the layer on these leaves, or on `leaves` in their place."""
        tensors = self.leaves | leaves
        case, text = self.case, None
        if case.text:
            text = (tensors["text_q"], tensors["text_k"], tensors["text_v"])
        out, text_out = ttt_layer(
            (tensors["q"], tensors["k"], tensors["v"]),
            tuple(tensors[name] for name in case.weight_names),
            case.settings,
            grid=Grid(rows=case.rows, columns=case.columns, num_prefix_tokens=case.prefix),
            q_conv=(tensors["q_weight"], tensors["q_bias"]),
            k_conv=(tensors["k_weight"], tensors["k_bias"]),
            text=text,
            impl=impl,
        )
        return (out,) if text_out is None else (out, text_out)
