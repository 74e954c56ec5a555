"""Tasks of text: losses of a record alone, and models that padding would change."""

import pytest
import torch
import torch.nn.functional as F

from dpopt.data.datasets import DataSpec
from dpopt.tasks import LanguageModeling, SequenceClassification


def spec(classes=0, length=8):
    return DataSpec("text", 4, classes, (length,), lambda *_: (None, None))


def test_a_record_counts_once_however_long_it_is():
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 8, 11), torch.randint(0, 11, (2, 8))
    targets[1, 2:] = -100
    task = LanguageModeling(spec())
    alone = [F.cross_entropy(outputs[0], targets[0]), F.cross_entropy(outputs[1, :2], targets[1, :2])]
    torch.testing.assert_close(task.loss_fn(outputs, targets), (alone[0] + alone[1]) / 2)
    sums = task.metric_sums(outputs, targets)
    assert sums["loss"] == pytest.approx(float(alone[0] + alone[1]), rel=1e-6)
    hits = [
        (outputs[0].argmax(1) == targets[0]).float().mean(),
        (outputs[1, :2].argmax(1) == targets[1, :2]).float().mean(),
    ]
    assert sums["accuracy"] == pytest.approx(float(hits[0] + hits[1]))
    assert task.summary({"loss": 2.0}) == {"perplexity": pytest.approx(7.389, rel=1e-3)}


def test_a_record_without_targets_has_loss_zero_and_no_gradient():
    outputs = torch.randn(1, 8, 11, requires_grad=True)
    loss = LanguageModeling(spec()).loss_fn(outputs, torch.full((1, 8), -100))
    loss.backward()
    assert loss == 0 and (outputs.grad == 0).all()


class MeanOfPads(torch.nn.Module):
    """Counts pads as tokens."""

    vocabulary = 11

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(12, 3)

    def forward(self, x):
        return self.table(x.clamp(min=0)).mean(1)


def test_a_model_that_sees_padding_is_refused():
    with pytest.raises(ValueError, match=r"depends on the padding behind it.*model.pooling=mean"):
        SequenceClassification(spec(3)).check(MeanOfPads())
