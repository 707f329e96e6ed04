"""What frameworks do with a model before they serve it: copy, half precision, pickle, fuse, torch.export."""

import copy
import io

import pytest
import timm.utils
import torch
from tiny import random_images, tiny_vit
from tiny_eva import tiny_eva
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import t5lib

MODELS = {
    "vit": lambda: t5lib.convert(tiny_vit("dinov2_registers")),
    "rotary": lambda: t5lib.convert(tiny_eva("dinov3")),
    "t5+": lambda: t5lib.convert(tiny_vit(img_size=48), "t5+"),
    "dit5": lambda: t5lib.convert(tiny_vit(img_size=48), "dit5"),
    "performer": lambda: t5lib.convert(tiny_vit(), "performer"),
    "vit3": lambda: t5lib.convert(tiny_vit(), "vit3"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def fused(model: nn.Module) -> nn.Module:
    """`model` with each batch norm folded into the convolution before it, and what its modules fuse themselves."""
    for module in model.modules():
        if isinstance(norm := getattr(module, "bn", None), nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, norm), nn.Identity()
        if callable(fuse := getattr(module, "fuse", None)):
            fuse()
    return timm.utils.reparameterize_model(model)


def images_for(model):
    return random_images(2, *model.patch_embed.img_size)


@every_model
@torch.no_grad()
def test_a_copy_in_half_precision_serves_and_the_model_stays_as_it_was(make):
    model = make().train()
    images = images_for(model)
    served = fused(copy.deepcopy(model).half().eval())
    assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    output = served(images.half())
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), model.eval()(images), rtol=2e-2, atol=2e-2)


@every_model
@torch.no_grad()
def test_a_pickled_checkpoint_is_read_in_full_precision(make):
    model = make()
    file = io.BytesIO()
    torch.save(copy.deepcopy(model).half(), file)
    file.seek(0)
    read = fused(torch.load(file, weights_only=False).float().eval())
    torch.testing.assert_close(read(images_for(model)), model(images_for(model)), rtol=2e-2, atol=2e-2)
    assert read.t5_config == model.t5_config


@pytest.mark.parametrize("make", [MODELS[name] for name in ("vit", "rotary", "t5+")], ids=("vit", "rotary", "t5+"))
@torch.no_grad()
def test_on_a_cpu_models_are_exported_by_pytorchs_own_operators(make):
    """No kernel of Triton is in the graph, which a machine without a GPU could not run."""
    model = make()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (images_for(model),), dynamic_shapes={"x": {0: auto}})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    namespaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert namespaces == {"aten"}
    images = random_images(5, *model.patch_embed.img_size, seed=1)
    torch.testing.assert_close(program.module()(images), model(images))
