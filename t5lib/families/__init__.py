"""Model families. Each has one adapter module, which owns where its attentions are and what its parts are called.

What an adapter offers (timm_vit, sd3, dit):

    check_convertible(model)             T5Error that names what cannot be converted
    attention_names(model)               names of all attentions; position i is layer i of TTTConfig.layers
    layer_sets(model)                    what the names in TTTConfig.layers mean here: {"all": (0, 1, …), "paper": …}
    fixed_grid(model)                    the grid of a model that takes images of one size, None of one that takes any
    make_grid(model)                     a TokenGrid that follows the size of every input
    follow_inputs(model, grid)           let `grid` be that of every input; a handle that ends it
    remove_grid(model)                   undo make_grid
    new_layer(attention, config, grid)   the TTTLayer that takes the place of `attention`
    softmax_attention(layer)             the attention that a TTTLayer stands for, with its present parts
    reset_left_out(model, name, inherit) fresh weights where TTTConfig.inherit leaves out the pretrained; their names
    mark(model, config), unmark(model)   make `model` known as converted, and no longer
    describe(model)                      a name and arguments that tell a model, weights aside, for checkpoints
    build(name, arguments, config)       such a model with fresh weights and, given `config`, converted
    skeleton(name, arguments, config)    the same without weights, to load some into
    PACKAGE                              the library whose version matters
    watch(attention, inputs, outputs, name)   see what an attention of a running softmax model gets and gives
    project(attention, tokens)           q, k and v of an attention or a TTTLayer
    projections(layer)                   the modules that make them

Tokens are a tuple: the image's (B, N, C), and in a joint attention the text's (B, T, C). q, k and v are
(B, H, N + T, D), the image's tokens first.
"""

from types import ModuleType

from torch import nn

from t5lib.utils.errors import T5Error

# Looked up by name, so that nothing is imported that the model at hand does not need.
_CLASSES = {
    ("timm", "VisionTransformer"): "timm_vit",
    ("diffusers", "SD3Transformer2DModel"): "sd3",
    ("diffusers", "DiTTransformer2DModel"): "dit",
}


def family_of(model: nn.Module) -> ModuleType:
    """The adapter of the family that `model` is of.

    Raises:
        T5Error: it is of no family that can be converted.
    """
    for base in type(model).__mro__:
        name = _CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if name:
            return adapter(name)
    raise T5Error(
        f"{type(model).__name__} is not a timm VisionTransformer (ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP …), nor "
        "diffusers' SD3Transformer2DModel or DiTTransformer2DModel; only these can be converted so far"
    )


def adapter(name: str) -> ModuleType:
    """The adapter module called `name`. Raises T5Error when there is none."""
    if name == "timm_vit":
        from t5lib.families import timm_vit as module
    elif name == "sd3":
        from t5lib.families import sd3 as module
    elif name == "dit":
        from t5lib.families import dit as module
    else:
        raise T5Error(f"unknown model family '{name}'; known: {', '.join(_CLASSES.values())}. Is this t5lib too old?")
    return module
