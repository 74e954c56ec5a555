"""Texts that a language model writes for the prompts of a test set, and how near they are to what people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpopt.data.tokens import IGNORED
from dpopt.grad_sample.modes import eval_mode

_AT_ONCE = 16  # prompts


@dataclass(frozen=True)
class Written:
    """A prompt, what the model wrote for it, and what people wrote."""

    prompt: str
    text: str
    references: list[str]


@torch.no_grad()
def write_texts(model: Any, tokenizer: Any, source: Any, count: int, beams: int = 1) -> list[Written]:
    """Let a model complete the first prompts of a source of test records.

    Args:
        model: a `Transformer` that writes.
        tokenizer: its own.
        source: with inputs (N, T) and targets (N, T), as `dataset=e2e` makes them; records that share a prompt are the
            references of it.
        count: how many prompts, fewer if there are not as many.
        beams: of the search; 1 takes the likeliest token each time.

    Raises:
        ValueError: when no record has a prompt.
    """
    asked: dict[tuple[int, ...], list[str]] = {}
    for tokens, targets in zip(source.inputs.tolist(), source.targets.tolist(), strict=True):
        written = [target for target in targets if target != IGNORED]
        if not written:  # a completion of which the tokenizer leaves nothing
            continue
        first = next(i for i, target in enumerate(targets) if target != IGNORED)
        asked.setdefault(tuple(tokens[: first + 1]), []).append(tokenizer.decode(written, skip_special_tokens=True))
    prompts = list(asked)[:count]
    if len(asked) == 1 and len(source) > 1:
        raise ValueError("the test records have no prompts, so there is nothing to complete: set dataset.columns")
    found = []
    with eval_mode(model):
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            made = _complete(model.network, part, source.inputs.shape[1], beams, tokenizer.eos_token_id)
            for prompt, tokens in zip(part, made, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                found.append(Written(tokenizer.decode(prompt, skip_special_tokens=True).strip(), text, asked[prompt]))
    return found


def _complete(network: Any, prompts: Sequence[Sequence[int]], length: int, beams: int, end: int | None) -> Any:
    """Return the tokens after each prompt, at most as many as a record may have."""
    device, longest, pad = next(network.parameters()).device, max(map(len, prompts)), network.config.pad_token_id or 0
    tokens = torch.full((len(prompts), longest), pad, device=device)
    present = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):  # padded in front: what is written follows the prompt
        tokens[i, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        present[i, longest - len(prompt) :] = 1
    made = network.generate(
        input_ids=tokens,
        attention_mask=present,
        max_new_tokens=max(1, length - min(map(len, prompts))),
        do_sample=False,
        num_beams=beams,
        pad_token_id=pad,
        eos_token_id=end,
    )
    return made[:, longest:].tolist()


def closeness(written: Sequence[Written]) -> dict[str, float]:
    """Measure `bleu` (sacreBLEU's, 0 to 100, over all texts) and `rouge_l` (F1, 0 to 1, mean over texts).

    A text is compared with all of its references; ROUGE-L takes the nearest.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    most = max(len(w.references) for w in written)
    columns: list[Any] = [[w.references[i] if i < len(w.references) else None for w in written] for i in range(most)]
    scorer = RougeScorer(["rougeL"])
    nearest = [max(scorer.score(r, w.text)["rougeL"].fmeasure for r in w.references) for w in written]
    return {
        "bleu": float(corpus_bleu([w.text for w in written], columns).score),
        "rouge_l": sum(nearest) / len(nearest),
    }
