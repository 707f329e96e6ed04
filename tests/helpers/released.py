"""Models in the released code's naming, written out from the method's equations and independent of t5lib.

The inner gradient comes from torch.autograd.grad of the written inner loss. Everything is functional, on a state dict.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6


def vit_state(
    *, width=24, depth=2, heads=3, patch=4, grid=(6, 6), classes=7, hidden=48, inner=3, conv=True, seed=0
) -> dict[str, Tensor]:
    """Random float64 weights of a small released ViT with a class token, every one of them other than its start."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.3) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = width // heads
    state = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 1 + grid[0] * grid[1], width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
        "head.weight": draw(classes, width),
        "head.bias": draw(classes),
    }
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    shapes |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for i in range(depth):
        for name, shape in shapes.items():
            state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = draw(*shape), draw(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = 1 + draw(width), draw(width)
        for name in ("w1", "w2", "w3")[:inner]:
            state[f"blocks.{i}.attn.{name}"] = draw(1, heads, head, head)
        for name in ("q_conv2d", "k_conv2d") if conv else ():
            state[f"blocks.{i}.attn.{name}.weight"] = draw(width, 1, 3, 3)
            state[f"blocks.{i}.attn.{name}.bias"] = draw(width)
    return state


def vit(state: dict[str, Tensor], images: Tensor, **attention_options) -> Tensor:
    """Logits of the released ViT. images: (B, 3, height, width)."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    block = 0
    while f"blocks.{block}.norm1.weight" in state:
        here = {name[len(f"blocks.{block}.") :]: v for name, v in state.items() if name.startswith(f"blocks.{block}.")}
        attn = {name[len("attn.") :]: value for name, value in here.items() if name.startswith("attn.")}
        x = x + attention(attn, layer_norm(here, "norm1", x), grid=grid, prefix=1, **attention_options)
        x = x + mlp(here, layer_norm(here, "norm2", x))
        block += 1
    return linear(state, "head", layer_norm(state, "norm", x)[:, 0])


def dit_state(
    *, width=24, depth=2, heads=3, patch=2, side=6, channels=4, classes=5, rescale=True, seed=0
) -> dict[str, Tensor]:
    """Random float64 weights of a small released DiT5 that predicts noise and variance."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.3) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (2 * channels * patch**2, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    state = {"pos_embed": draw(1, side**2, width), "y_embedder.embedding_table.weight": draw(classes + 1, width)}
    for i in range(depth):
        block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "adaLN_modulation.1": (6 * width, width)}
        block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        block |= {"attn.q_conv2d": (width, 1, 3, 3), "attn.k_conv2d": (width, 1, 3, 3)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        for name in ("w1", "w2"):
            state[f"blocks.{i}.attn.{name}"] = draw(1, heads, width // heads, width // heads)
        if rescale:
            state[f"blocks.{i}.attn.qk_scale_ttt"] = 1 + draw(1, 1, width, 2)
            state[f"blocks.{i}.attn.qk_offset_ttt"] = draw(1, 1, width, 2)
    for name, shape in shapes.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(*shape), draw(shape[0])
    return state


def dit(state: dict[str, Tensor], latents: Tensor, steps: Tensor, labels: Tensor, *, window: int | None = 5) -> Tensor:
    """Output (B, 2 · channels, height, width) of the released DiT5. latents: (B, channels, height, width)."""
    patch = state["x_embedder.proj.weight"].shape[-1]
    x = F.conv2d(latents, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    grid = tuple(x.shape[-2:])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = steps[:, None].float() * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x)
    condition = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", waves)))
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][labels])
    block = 0
    while f"blocks.{block}.attn.w1" in state:
        here = {name[len(f"blocks.{block}.") :]: v for name, v in state.items() if name.startswith(f"blocks.{block}.")}
        attn = {name[len("attn.") :]: value for name, value in here.items() if name.startswith("attn.")}
        shift, scale, gate, *rest = linear(here, "adaLN_modulation.1", condition)[:, None].chunk(6, dim=-1)
        x = x + gate * attention(attn, modulated(x, shift, scale), grid=grid, prefix=0, residual=True, window=window)
        x = x + rest[2] * mlp(here, modulated(x, rest[0], rest[1]), approximate="tanh")
        block += 1
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, dim=-1)
    x = linear(state, "final_layer.linear", modulated(x, shift, scale))
    x = x.reshape(len(x), *grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, grid[0] * patch, grid[1] * patch)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift


def attention(
    state: dict[str, Tensor], x: Tensor, *, grid: tuple[int, int], prefix: int, residual=False, window=None, eps=1.0
) -> Tensor:
    """A released T5 layer. x: (B, N, C), `prefix` tokens before the grid's. Returns (B, N, C)."""
    B, N, C = x.shape
    heads, width = state["w1"].shape[1:3]
    q, k, v = linear(state, "qkv", x).reshape(B, N, 3, C).unbind(2)
    raw = [t.reshape(B, N, heads, width).transpose(1, 2) for t in (q, k, v)]
    if "qk_scale_ttt" in state:
        qk = torch.stack([q, k], dim=-1) * state["qk_scale_ttt"] + state["qk_offset_ttt"]
        q, k = qk.unbind(-1)
    q, k, v = (t.reshape(B, N, heads, width).transpose(1, 2) for t in (q, k, v))
    k = (k - k.mean(2, keepdim=True)) / (k.var(2, keepdim=True, unbiased=False) + eps).sqrt()
    if "q_conv2d.weight" in state:
        q, k = convolve(state, "q_conv2d", q, grid, prefix), convolve(state, "k_conv2d", k, grid, prefix)
    o = inner_step(state, q, k, v, residual=residual)
    if window:
        near = neighborhood(*(t[:, :, prefix:] for t in raw), grid, window)
        o = torch.cat([o[:, :, :prefix], (o[:, :, prefix:] + near) / 2], dim=2)
    return linear(state, "proj", o.transpose(1, 2).reshape(B, N, C))


def inner_step(state: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, *, residual: bool) -> Tensor:
    """One gradient step on the inner loss of keys and values, then the inner model on the queries."""
    names = [name for name in ("w1", "w2", "w3") if name in state]
    weights = [state[name].expand(len(q), -1, -1, -1) for name in names]
    weights = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]

    def inner(t: Tensor, w: list[Tensor]) -> Tensor:
        return (F.silu(t @ w[0]) * (t @ w[1])) @ w[2] if len(w) == 3 else F.silu(t @ w[0]) @ w[1]

    lr = q.shape[-1] ** -0.5 / q.shape[2]
    fitted = inner(k, weights)
    loss = lr * ((fitted - v).square().sum() / 2 if residual else -(fitted * v).sum())
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    return inner(q, [w - g for w, g in zip(weights, gradients, strict=True)])


def convolve(state: dict[str, Tensor], name: str, t: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    B, H, N, D = t.shape
    image = t[:, :, prefix:].transpose(2, 3).reshape(B, H * D, *grid)
    image = image + F.conv2d(image, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, groups=H * D)
    return torch.cat([t[:, :, :prefix], image.reshape(B, H, D, N - prefix).transpose(2, 3)], dim=2)


def neighborhood(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Softmax attention of every grid token to a window × window square, shifted inward at the borders."""

    def start(index: int, length: int) -> int:
        return min(max(index - window // 2, 0), length - window)

    rows, columns = grid
    out = []
    for r in range(rows):
        for c in range(columns):
            top, left = start(r, rows), start(c, columns)
            near = [i * columns + j for i in range(top, top + window) for j in range(left, left + window)]
            scores = (q[:, :, [r * columns + c]] @ k[:, :, near].transpose(2, 3)) / math.sqrt(q.shape[-1])
            out.append(scores.softmax(-1) @ v[:, :, near])
    return torch.cat(out, dim=2)


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], LAYER_NORM_EPS)


def mlp(state: dict[str, Tensor], x: Tensor, approximate: str = "none") -> Tensor:
    return linear(state, "mlp.fc2", F.gelu(linear(state, "mlp.fc1", x), approximate=approximate))
