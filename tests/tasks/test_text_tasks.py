"""Tasks of text: losses of a record alone, and models that padding would change."""

import types

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


class Parrot(torch.nn.Module):
    """Continues every prompt by "a good" and the end, however the prompts are padded."""

    def __init__(self):
        super().__init__()
        from transformers import AutoConfig

        self.weight, self.config = torch.nn.Parameter(torch.zeros(1)), AutoConfig.for_model("llama", pad_token_id=0)

    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, **options):
        assert options["num_beams"] == 2 and not options["do_sample"]
        assert (input_ids[attention_mask == 0] == 0).all() and (attention_mask[:, -1] == 1).all()
        written = torch.tensor([[4, 6, eos_token_id]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, written], 1)


def test_texts_are_completed_and_compared_with_all_references(tmp_path):
    """Records of one prompt are its references, none of which the model sees; a repeated reference scores fully."""
    from text_models import make_tokenizer
    from transformers import AutoTokenizer

    from dpopt.tasks.generation import closeness, write_texts

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, cls=False))
    model = torch.nn.Module()
    model.network = Parrot()
    rows = [([13, 6], [4, 7, 3]), ([13, 6], [4, 6, 3]), ([13], [4, 7, 7, 3])]
    tokens, targets = torch.full((4, 8), -1), torch.full((4, 8), -100)
    tokens[3, :2] = 4  # a record without a target asks for nothing
    for i, (prompt, completion) in enumerate(rows):
        tokens[i, : len(prompt + completion) - 1] = torch.tensor(prompt + completion[:-1])
        targets[i, len(prompt) - 1 : len(prompt + completion) - 1] = torch.tensor(completion)
    source = types.SimpleNamespace(inputs=tokens, targets=targets)
    found = write_texts(model, tokenizer, source, 5, beams=2)
    assert [(w.prompt, w.text, w.references) for w in found] == [
        ("name good", "a good", ["a bad", "a good"]),
        ("name", "a good", ["a bad bad"]),
    ]
    assert closeness(found[:1])["rouge_l"] == 1.0
    assert closeness(found[1:])["rouge_l"] == pytest.approx(0.4)  # one of two words, one of three
    assert closeness(found)["bleu"] < 100
