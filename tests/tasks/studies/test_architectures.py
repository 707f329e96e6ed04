"""The list of what converts."""

from tasks.studies.architectures import families, table

NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "xcit_nano_12_p16_224"]


def test_architectures_are_listed_by_the_class_of_their_models_with_a_reason_each():
    found = families(NAMES)
    assert found["Eva"].converted == NAMES[1:3] and not found["Eva"].refused
    assert list(found["Xcit"].refused) == NAMES[3:]
    assert table(found).splitlines() == [
        "Eva: 2 of 2",
        "VisionTransformer: 1 of 1",
        "Xcit: 0 of 1",
        "    its attention is linear already",
        "all: 3 of 4",
    ]
