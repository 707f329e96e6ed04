"""Which parts of a model are trained, how fast, and by which optimizer."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

from t5lib.conversion import new_parameters
from t5lib.training import lora
from t5lib.training.recipe import LoopConfig
from t5lib.utils.errors import T5Error


def freeze(model: nn.Module, config: LoopConfig) -> list[nn.Parameter]:
    """Leave only what `config.trainable` names with a gradient; returns the parameters it froze.

    Raises:
        T5Error: "new" on a model without converted layers.
    """
    if config.trainable == "all":
        return []
    if config.trainable == "lora":
        before = [p for p in model.parameters() if p.requires_grad]
        lora.attach(model, config.lora_rank, config.lora_alpha)
        return before
    new = set(new_parameters(model).values())
    if not new:
        raise T5Error("the freeze protocol trains the new parameters, but this model has none; convert it first")
    frozen = [p for p in model.parameters() if p.requires_grad and p not in new]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def groups(model: nn.Module, config: LoopConfig) -> list[dict]:
    """Parameters by (new or inherited, decayed or not): their learning rates and weight decay differ."""
    new = set(new_parameters(model)) | {name for name, _ in model.named_parameters() if "lora_" in name}
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            groups.setdefault((name in new, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": config.lr_new if is_new else config.lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "use_fallback": is_new or not decayed,  # of Muon: AdamW
        }
        for (is_new, decayed), parameters in groups.items()
    ]


def _adamw() -> Callable[[list[dict]], torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, fused=torch.cuda.is_available())


def _adamw8bit() -> Callable[[list[dict]], torch.optim.Optimizer]:
    with contextlib.suppress(ImportError):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    raise T5Error("train: optimizer 'adamw8bit' needs bitsandbytes; install it (pip install bitsandbytes), or 'adamw'")


def _muon() -> Callable[[list[dict]], torch.optim.Optimizer]:
    from timm.optim.muon import Muon  # timm takes seconds to import

    # Its steps are as long as AdamW's would be, so that the same rates serve.
    return functools.partial(Muon, adjust_lr_fn="match_rms_adamw", betas=(0.9, 0.999))


OPTIMIZERS = {"adamw": _adamw, "adamw8bit": _adamw8bit, "muon": _muon}
