"""A converted ViT is called as the softmax model is: the same shapes, types and errors."""

import pytest
import torch
from tiny import random_images, tiny_vit

import t5lib
from t5lib.utils.errors import T5Error


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_images()


def pruned(model, images):
    return model.prune_intermediate_layers([0]), model.forward_features(images)


def resized(model, images):
    model.set_input_size(img_size=(48, 32))
    return model(random_images(2, 48, 32))


def under_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(images)


def trained_after_inference(model, images):
    with torch.inference_mode():
        model(images)
    model.train()(images).sum().backward()
    return model.head.weight.grad


def gradient_of_images(model, images):
    images = images.clone().requires_grad_()
    model(images).sum().backward()
    return images.grad


CALLS = {
    "whole numbers": lambda model, images: model(images.to(torch.uint8)),
    "one channel": lambda model, images: model(images[:, :1]),
    "five axes": lambda model, images: model(images[None]),
    "three axes": lambda model, images: model(images[0]),
    "no images": lambda model, images: model(images[:0]),
    "every other pixel": lambda model, _: model(random_images(2, 64, 64)[:, :, ::2, ::2]),
    "channels last": lambda model, images: model(images.to(memory_format=torch.channels_last)),
    "double": lambda model, images: model(images.double()),
    "all double": lambda model, images: model.double()(images.double()),
    "another size": lambda model, _: model(random_images(2, 40, 32)),
    "not finite": lambda model, images: model(images * float("nan")),
    "autocast": under_autocast,
    "trained after inference": trained_after_inference,
    "gradient of images": gradient_of_images,
    "mapped": lambda model, images: torch.func.vmap(model)(images[:, None]),
    "functional": lambda model, images: torch.func.functional_call(model, dict(model.named_parameters()), (images,)),
    "shared memory": lambda model, images: model.share_memory()(images),
    "new size": resized,
    "pruned": pruned,
    "block removed": lambda model, images: (model.blocks.pop(0), model(images))[1],
    "intermediates": lambda model, images: model.forward_intermediates(images, [0], output_dict=True),
    "no such block": lambda model, images: model.forward_intermediates(images, [9]),
    "averaged": lambda model, images: torch.optim.swa_utils.AveragedModel(model)(images),
}


def told(result):
    """The shapes and types in what a call gives."""
    if isinstance(result, torch.Tensor):
        return tuple(result.shape), result.dtype, bool(result.isfinite().all())
    if isinstance(result, dict):
        return {name: told(value) for name, value in result.items()}
    return [told(each) for each in result] if isinstance(result, list | tuple) else result


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_answered_or_refused_as_by_the_softmax_model(call, images):
    def answer(model):
        try:
            return told(call(model, images))
        except Exception as error:
            return type(error), str(error)

    assert answer(t5lib.convert(tiny_vit())) == answer(tiny_vit())


def test_torchscript_and_symbolic_tracing_are_refused_by_name():
    converted = t5lib.convert(tiny_vit())
    with pytest.raises(T5Error, match=r"TorchScript cannot take a TTT layer; use torch\.export"):
        torch.jit.script(converted)
    with pytest.raises(T5Error, match=r"torch\.fx traces without sizes.*use torch\.export"):
        torch.fx.symbolic_trace(converted)
