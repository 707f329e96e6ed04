"""Low-rank adapters on the projections around linear attention: the second step of LoLCATs, done by peft.

Source: "LoLCATs: On Low-Rank Linearizing of Large Language Models" (arXiv 2410.10254): after attention transfer all
weights are frozen, the feature maps too, and adapters of the query, key, value and output projections make up for what
the transfer left. In a timm model queries, keys and values are one projection, so they share an adapter's input side.
"""

from torch import nn

from t5lib.conversion import ttt_layers
from t5lib.utils.errors import T5Error


def attach(model: nn.Module, rank: int, alpha: float) -> None:
    """Put an adapter, W + alpha / rank · B A with B = 0 at first, on every projection of every converted attention.

    The adapters (parameters with "lora_" in their names) are then all of `model` that has a gradient. A is drawn from
    torch's global generator. Undone by `merge`.

    Raises:
        T5Error: no attention of `model` is converted.
    """
    targets = [
        f"{name}.{part}"
        for name, layer in ttt_layers(model).items()
        for part, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not part.startswith("mixer.")
    ]
    if not targets:
        raise T5Error(
            "adapters go on the projections of converted attentions, but this model has none; convert it first"
        )
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]  # int, says PEFT
    inject_adapter_in_model(config, model)


def merge(model: nn.Module) -> None:
    """Add what the adapters learned to the weights they adapt and take them off: a model with its old parameters."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
