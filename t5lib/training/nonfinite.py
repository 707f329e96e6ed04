"""Why a loss is not finite: which layers blew up, and the advice that fits."""

import torch
from torch import Tensor, nn

from t5lib.families import family_of
from t5lib.families.inputs import Inputs
from t5lib.utils.threads import of_this_thread

LARGE = 1e4


@torch.no_grad()
def activation_peaks(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Largest absolute output of every leaf and attention module, in order of execution.

    Args:
        inputs: what `model` is called with.
    """
    peaks: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()) or name.rpartition(".")[2].startswith("attn"):
            hooks.append(module.register_forward_hook(of_this_thread(_recorder(peaks, name))))
    try:
        family_of(model).call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return peaks


def explain_blow_up(model: nn.Module, inputs: Inputs, config, step: int, loss: float, grad_norm: float) -> str:
    """The message for a loss or gradient that is not finite at `step`.

    Args:
        inputs: see activation_peaks.
        config: the LoopConfig in use; the advice names its values.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        peaks = activation_peaks(model, inputs)
    broken = [name for name, peak in peaks.items() if peak != peak or peak == float("inf")]
    large = sorted((n for n, peak in peaks.items() if LARGE < peak < float("inf")), key=lambda n: -peaks[n])
    lines = [f"training stopped at step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}."]
    if broken:
        lines.append(f"Not finite first in {broken[0]} ({len(broken)} modules in all).")
    if large:
        lines.append("Largest activations: " + ", ".join(f"{n} {peaks[n]:.3g}" for n in large[:5]) + ".")
    if not broken and not large:
        lines.append("All activations are in range, so the backward pass overflowed.")
    lines.append("Advice: " + "; ".join(_advice(model, config)) + ".")
    return " ".join(lines)


def _advice(model: nn.Module, config) -> list[str]:
    advice = []
    t5 = getattr(model, "t5_config", None)
    if t5 and t5.key_norm in ("none", "instance_no_mean"):
        advice.append(f"key_norm '{t5.key_norm}' leaves the shift in the keys, which diverges: use 'instance'")
    if config.precision == "bf16":
        advice.append("try precision fp32")
    if config.clip_norm is None:
        advice.append("set clip_norm, e.g. 1.0")
    advice.append(f"lower the learning rates (lr {config.lr:g}, lr_new {config.lr_new:g}) or lengthen warmup")
    return advice


def _recorder(peaks: dict[str, float], name: str):
    def record(_module: nn.Module, _inputs, output) -> None:
        tensors = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
        if tensors:  # torch's amax, unlike Python's max, keeps NaN
            peaks[name] = torch.stack([part.detach().float().abs().amax() for part in tensors]).amax().item()

    return record
