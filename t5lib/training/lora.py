"""Low-rank adapters on the projections around linear attention: the second step of LoLCATs, done by peft.

Source: "LoLCATs: On Low-Rank Linearizing of Large Language Models" (arXiv 2410.10254): after attention transfer all
weights are frozen, the feature maps too, and adapters of the query, key, value and output projections make up for what
the transfer left. In a timm model queries, keys and values are one projection, so they share an adapter's input side.
"""

from torch import nn

from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.utils.errors import T5Error


def attach(model: nn.Module, rank: int, alpha: float) -> None:
    """Put an adapter, W + alpha / rank · B A with B = 0 at first, on every projection of every converted attention.

    Of a softmax model, which a converted one is compared with, all attentions get them.

    The adapters (parameters with "lora_" in their names) are then all of `model` that has a gradient. A is drawn from
    torch's global generator. Undone by `merge`.

    Raises:
        T5Error: no attention of `model` has projections that are plain linear layers.
    """
    attentions = dict(ttt_layers(model)) or {n: model.get_submodule(n) for n in family_of(model).attention_names(model)}
    targets = [
        f"{name}.{part}"
        for name, layer in attentions.items()
        for part, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not part.startswith("mixer.")
    ]
    if not targets:
        raise T5Error(
            f"adapters go on linear projections of attentions, and this {type(model).__name__} has none; "
            "train all of it: trainable 'all'"
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
