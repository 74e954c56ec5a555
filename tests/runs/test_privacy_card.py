"""The privacy card stands alone: it says where the model is from, recomputes its ε, and is one safe HTML file."""

import hashlib
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
import torch.nn.functional as F
from helpers import make_plan, small_data, small_model
from strict_html import EVIL, Page

import dpopt
from dpopt.privacy.guessing import correct_guesses
from dpopt.runs.identity import locate
from dpopt.runs.markdown import code, plain, to_html
from dpopt.runs.provenance import git_commit, short_commit
from dpopt.training.run import run

pytestmark = pytest.mark.slow


def recomputed(card: str) -> float:
    """Run the code on the card."""
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with redirect_stdout(io.StringIO()) as printed:
        exec(block, {})
    return float(printed.getvalue())


def test_a_card_of_a_run_stands_alone(config):
    result = run(config)
    again = run(replace(config, tag="again"))
    directory = locate(config)
    card = (directory / "privacy_card.md").read_text()
    assert recomputed(card) == result["epsilon"] and f"this prints ε = {result['epsilon']:.6g}" in card
    bound = 100 * correct_guesses(result["epsilon"], result["delta"])
    (told,) = re.findall(r"right at most \*\*([\d.]+) times in 100", card)
    assert bound <= float(told) <= bound + 0.01
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    for words in (
        f"| date | {datetime.now(UTC):%Y-%m-%d} (UTC) |",
        f"dpopt {dpopt.__version__}, commit `{short_commit(git_commit())}`",
        f"HMAC-SHA256 `{result['data_mac']}`",
        f"under the key `{result['fingerprint_key']}`",
        f"| weights | `model.safetensors`, SHA-256 `{weights}` |",
        "training `cnn` on `digits`",
        "losses on a grid of 0.0001",
        "| steps T | 3 noisy releases",
        "| initial weights (public) | drawn at random by the seed |",
        "| ledger of who trained | 1 private run on this dataset, together (0.9",
    ):
        assert words in card, words
    assert "initial weights file" not in card
    second = (locate(replace(config, tag="again")) / "privacy_card.md").read_text()
    (total,) = re.findall(r"2 private runs on this dataset, together \(([\d.]+), 0.0001\) \|", second)
    assert again["epsilon"] < float(total) < 2 * again["epsilon"]


def test_a_run_outside_the_ledger_is_counted_on_its_card(config):
    run(config)
    run(replace(config, ledger="off", tag="off"))
    card = (locate(replace(config, tag="off")) / "privacy_card.md").read_text()
    assert "| 2 private runs on this dataset, together (1." in card and "this run is not in the ledger" in card
    (locate(config).parents[1] / "home/ledger.jsonl").write_text("{}\n")
    run(replace(config, ledger="off", tag="damaged"))
    card = (locate(replace(config, tag="damaged")) / "privacy_card.md").read_text()
    assert "| ledger of who trained | not known" in card


def test_initial_weights_from_a_file_are_hashed(tmp_path):
    from dpopt.runs.origin import initial_file, weights_row

    path = tmp_path / "start.safetensors"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for node in ({"weights": str(path)}, {"path": str(path), "pretrained": True}):
        assert digest in weights_row("initial", initial_file(node))["initial"]
    assert not any(
        weights_row("initial", initial_file(node))
        for node in ({}, {"path": str(path), "pretrained": False}, {"path": "owner/name", "pretrained": True})
    )


def test_the_page_is_the_card_and_loads_nothing(config):
    run(config)
    directory = locate(config)
    text = (directory / "privacy_card.html").read_text()
    page = Page(text)
    assert page.told("h1") == f"Privacy card: {directory.name}" and len(page.all_of("table")) == 2
    assert not page.all_of("script") and not re.search(r"https?://|url\(|@import", text)
    assert not any({"src", "href", "action"} & set(attributes) for _, attributes in page.elements)
    policy = next(a["content"] for a in page.all_of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "from_gaussian_mechanism" in page.told("pre") and "training" in page.told("td")
    (directory / "privacy_card.html").unlink()
    run(replace(config, fresh=True))
    assert (directory / "privacy_card.html").exists()


def trained(clip=None, steps=2, plan=None, **options):
    """A training loop of one's own; its data and what took the steps."""
    model, data = small_model(), small_data()
    plan = plan or dpopt.PrivacyPlan(1.0, 64, 16, 20, 1e-3)
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, clip or dpopt.clipping.Flat(0.7), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in dpopt.poisson_batches(data, plan, micro_batch=16):
        if batch.step == steps:
            break
        private.backward(batch)
        optimizer.step()
    return plan, private, data


def test_a_card_of_an_own_loop(tmp_path):
    plan, private, data = trained()
    torch.save(private.model.state_dict(), tmp_path / "own.pt")
    digest = hashlib.sha256((tmp_path / "own.pt").read_bytes()).hexdigest()
    card = dpopt.card(
        plan,
        private,
        tmp_path / "card",
        data,
        tmp_path / "own.pt",
        dataset="tickets",
        unit="one ticket",
        initial_weights="drawn at random",
    )
    assert (tmp_path / "card/privacy_card.md").read_text() == card
    assert Page((tmp_path / "card/privacy_card.html").read_text()).told("h1") == "Privacy card: Sequential on tickets"
    assert recomputed(card) == plan.epsilon_at(2) and f"(ε = {plan.epsilon_at(2):.4g}, δ = 0.001)" in card
    for words in (
        "after 2 of 20 planned steps",
        "that follows from `p.grad`",
        "| privacy unit | one ticket |",
        "an optimizer that is not stated",
        "| preprocessing (public) | not stated",
        "| initial weights (public) | drawn at random |",
        "dpopt.privacy.clipping.Flat, sensitivity 0.7 |",
        "kept in memory alone",
        f"SHA-256 `{digest}`",
        "1 private run on this dataset, together",
        "past `PrivateGradient`",
    ):
        assert words in card, words
    assert "No claim" not in card and "secret.key" not in card and "statistics" not in card


@pytest.mark.parametrize("clip", [dpopt.clipping.Slack(0.7), dpopt.clipping.Adaptive(0.7, count_noise=4.0), None])
def test_a_clip_norm_that_moves_is_said_to(clip):
    plan = replace(make_plan(), count_noise=4.0 if type(clip) is dpopt.clipping.Adaptive else 0.0)
    card = dpopt.card(*trained(clip, plan=plan)[:2])
    if clip is None:
        assert "sensitivity 0.7 |" in card
    else:
        assert f"sensitivity {clip.sensitivity:g} at the end, moved at every step by" in card


def test_what_an_own_loop_does_not_state_is_named():
    plan, private, _ = trained(plan=make_plan(), diagnostics=True)
    card = dpopt.card(plan, private)
    assert card.count("not stated") >= 4 and "not hashed" in card and "| weights |" not in card
    assert "No claim: reproducible noise" in card and "expanded from a seed" in card
    assert "all that is in `PrivateGradient.statistics`**" in card
    none = dpopt.card(*trained(plan=make_plan(sigma=0.0))[:2])
    assert "is not private" in none and "Recompute" not in none


def test_what_a_card_cannot_know_is_refused(tmp_path):
    plan, private, _ = trained()
    other, fresh, _ = trained(steps=0)
    for arguments, stated, message in (
        ((replace(plan, steps=21, key=plan.key), private), {}, "the plan alone does not show"),
        ((plan, plan), {}, "pass the PrivateGradient"),
        ((other, fresh), {}, "no step was taken"),
        ((plan, private), {"weights": tmp_path / "none.pt"}, "none.pt is missing"),
        ((plan, private), {"units": "one ticket"}, "a card states no units: it takes name, dataset, model"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
            dpopt.card(*arguments, **stated)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("evil", [EVIL, "a|b`c**d\n# e\n```\n| f |", "[x](javascript:alert(1))", "\\|", "_a_ # `"])
def test_names_are_text_in_both_forms(evil, tmp_path):
    plan, private, data = trained()
    stated = {name: evil for name in ("name", "dataset", "model", "optimizer", "unit", "preprocessing")}
    dpopt.card(plan, private, tmp_path, data, **stated)
    page = Page((tmp_path / "privacy_card.html").read_text())
    assert not page.all_of("script") and not page.all_of("img") and len(page.all_of("table")) == 2
    shown = " ".join(evil.split())
    assert page.told("h1") == f"Privacy card: {shown}" and page.told("td").count(shown) >= 2
    assert page.told("h2").startswith("In plain words") and len(page.all_of("pre")) == 1


def test_markdown_of_names():
    assert plain("a_b c|d\n<e>") == r"a_b c\|d \<e\>" and code("a_b") == "`a_b`" and code("a`b") == r"a\`b"
    assert to_html(f"| {plain('x|y`z')} | {code('a_b')} |").count("<td>") == 1
    assert "<pre>&lt;a\n| b |</pre>" in to_html("text\n```python\n<a\n| b |\n```\n- item")
    assert json.dumps(to_html("```")) == '"<pre></pre>"'
