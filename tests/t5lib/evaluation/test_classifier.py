"""Scores are what one counts by hand, on every image once, for all models side by side."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from t5lib.evaluation.classifier import evaluate, predict, score
from t5lib.utils.errors import T5Error

# Six classes, four images. Ranks of the true class: first, second, fifth, last.
LOGITS = torch.tensor(
    [
        [9.0, 1, 2, 3, 4, 5],
        [5.0, 9, 1, 2, 3, 4],
        [9.0, 5, 8, 7, 6, 0],
        [9.0, 8, 7, 6, 5, 0],
    ]
)
LABELS = torch.tensor([0, 0, 1, 5])


class Fixed(nn.Module):
    """Gives the logits of the image whose number is in its first pixel."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.scale = logits, nn.Parameter(torch.ones(()))
        self.modes = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.logits[images[:, 0, 0, 0].long()] * self.scale


def batches():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    return [(images[:3], LABELS[:3]), (images[3:], LABELS[3:])]


def test_score_equals_the_count_by_hand():
    found = score(LOGITS, LABELS, expected=torch.tensor([0, 0, 0, 0]))
    assert (found.top1, found.top5, found.agreement, found.n) == (25.0, 75.0, 75.0, 4)
    by_hand = sum(-F.log_softmax(row, 0)[label] for row, label in zip(LOGITS, LABELS, strict=True)) / 4
    assert found.loss == pytest.approx(by_hand.item())


def test_top5_of_five_classes_and_agreement_with_nobody_are_left_out():
    found = score(LOGITS[:, :5], torch.tensor([0, 0, 1, 4]))
    assert found.top5 is None and found.agreement is None
    assert set(found.as_dict()) == {"top1", "loss", "n"}


def test_models_are_scored_on_the_same_batches_and_compared_with_the_reference():
    turned = LOGITS.roll(1, dims=1)
    turned[0] = LOGITS[0]
    models = {"source": Fixed(LOGITS), "turned": Fixed(turned)}
    progress = []
    scores = evaluate(models, iter(batches()), reference="source", on_batch=progress.append)
    assert scores["source"] == score(LOGITS, LABELS, LOGITS.argmax(1)) and scores["source"].agreement == 100.0
    assert scores["turned"].agreement == 25.0 and scores["turned"].top1 == 50.0
    assert progress == [3, 4]


def test_models_run_in_eval_mode_without_gradients_and_are_left_in_the_mode_they_were_in():
    model, other = Fixed(LOGITS).train(), Fixed(LOGITS).eval()
    evaluate({"model": model, "other": other}, batches())
    assert model.modes == other.modes == [(False, False, False)] * 2
    assert model.training and not other.training


def test_bf16_is_autocast_and_logits_come_back_in_float32():
    model = Fixed(LOGITS)
    logits, labels = predict({"model": model}, batches(), precision="bf16")
    assert model.modes[0] == (False, False, True)
    assert logits["model"].dtype == torch.float32 and torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"precision": "fp16"}, "precision 'fp16' is unknown; expected one of fp32, bf16"),
        ({"reference": "sourse"}, "reference 'sourse' is unknown; expected one of source; did you mean 'source'"),
    ],
    ids=["no images", "precision", "reference"],
)
def test_what_cannot_be_scored_is_refused(given, message):
    with pytest.raises(T5Error, match=message):
        evaluate({"source": Fixed(LOGITS)}, given.pop("batches", batches()), **given)
