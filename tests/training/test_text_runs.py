"""Text from file to exported model: classification, language modeling, adapters, and the statement on the card."""

import csv
import io
import json
import re

import pytest
import torch
import yaml
from text_models import BERT, LLAMA, make_model, make_tokenizer

import dpopt
from dpopt.runs.directory import read_config
from dpopt.training.build import make_task
from dpopt.training.finished import load_test_set

COMMON = ("epsilon=8", "batch_size=16", "steps=4", "delta=1e-3", "logger=csv", "eval_every=2", "ledger=off")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bert"), BERT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), LLAMA)


def write_classes(folder, count=48):
    rows = [f"the film is {'very ' * (i % 3)}{('good', 'bad', 'fine', 'dull')[i % 4]},{i % 2}" for i in range(count)]
    for name, order in (("train", rows[::-1]), ("tickets", rows)):
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(order) + "\n")
    return [
        *(
            "dataset=text_file",
            f"dataset.files=[{folder}/train.csv,{folder}/tickets.csv]",
            f"dataset.train_size={count}",
        ),
        *("dataset.classes=['0','1']", "dataset.max_length=12", "dataset.unit='one ticket'"),
    ]


def write_pairs(folder, count=48):
    rows = [{"prompt": f"name {'very ' * (i % 3)}film", "text": "a good film is good"} for i in range(count)]
    for name, order in (("train", rows[::-1]), ("pairs", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    files = f"dataset.files=[{folder}/train.jsonl,{folder}/pairs.jsonl]"
    return ["dataset=text_file", files, f"dataset.train_size={count}", "dataset.columns=[prompt,text]"]


def trained(command, *words):
    done = command("train", *words, *COMMON)
    assert done.returncode == 0, done.stderr
    return done


def run_of(tmp_path):
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    return run


@pytest.mark.parametrize("train", ["full", "lora", "bitfit", "head"])
def test_a_classifier_of_tickets(command, tmp_path, bert, train):
    """Train, state, evaluate, export; plain transformers then computes the same scores."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    model = (
        "model=hf",
        f"model.path={bert}",
        "model.pooling=mean",
        "model.pretrained_on=unknown",
        f"model.train={train}",
    )
    said = trained(command, *write_classes(tmp_path), *model, "optimizer=dp_adam").stdout
    assert "texts of 12 tokens; shorter take less" in " ".join(said.replace("│", "").split())
    run = run_of(tmp_path)
    card = (run / "privacy_card.md").read_text()
    assert "| privacy unit | one ticket |" in card and f"{bert}, taken as trained on unknown" in card
    assert "accuracy" in command("evaluate", str(run)).stdout
    done = command("export", str(run), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    network, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    head = load_file(tmp_path / "out/head.safetensors")
    text = tokenizer("the film is good", return_tensors="pt")
    with torch.no_grad():
        mean = network.eval()(**text).last_hidden_state.mean(1)
        expected = mean @ head["weight"].T + head["bias"]
        found = dpopt.load(run)(text["input_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out/privacy_card.md").read_text() == card
    front = yaml.safe_load((tmp_path / "out/README.md").read_text()[4:].partition("\n---\n")[0])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-classification")
    assert front["privacy"]["unit"] == "one ticket"
    again = command("export", str(run), str(tmp_path / "out"))
    assert again.returncode == 1 and "is not empty: name a new folder" in again.stderr


def test_rows_are_predicted_as_the_test_set(command, tmp_path, bert):
    """Their tokens are those of the test set; an empty row stops no other, a file without the column all."""
    model = ("model=hf", f"model.path={bert}", "model.pooling=mean", "model.pretrained_on=unknown", "model.train=head")
    trained(command, *write_classes(tmp_path), *model, "optimizer=dp_adam")
    run = run_of(tmp_path)
    rows = [("the film is very very good", 1), ("", 2), ("the film is bad", 3)]
    (tmp_path / "new.csv").write_text("id,text\n" + "".join(f"{number},{text}\n" for text, number in rows))
    done = command("predict", str(run), str(tmp_path / "new.csv"))
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/new.csv:2 has no text in the column 'text': fill it in\n"
    found = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in found] == [f"{tmp_path}/new.csv:1", f"{tmp_path}/new.csv:3"]
    config = read_config(run)
    task = make_task(config)
    test = load_test_set(config, task)
    inputs = torch.stack([task.spec.inputs({"text": text}) for text, _ in rows if text])
    first = task.spec.inputs({"text": "the film is good"})
    assert torch.equal(first, test.inputs[0]) and inputs.shape == (2, 12)
    with torch.no_grad():
        likely = dpopt.load(run)(inputs[:, :12]).softmax(1).max(1)
    assert [row["class"] for row in found] == [str(number) for number in likely.indices.tolist()]
    values = torch.tensor([float(row["probability"]) for row in found])
    torch.testing.assert_close(values, likely.values, rtol=1e-4, atol=1e-5)
    (tmp_path / "other.csv").write_text("body\nthe film\n")
    done = command("predict", str(run), str(tmp_path / "other.csv"))
    assert done.returncode == 1 and "has no column 'text' but body: rename it" in done.stderr and not done.stdout
    done = command("predict", str(run), str(tmp_path))
    assert done.returncode == 1 and "reads rows: name a .csv, .tsv or .jsonl file" in done.stderr


def test_a_network_with_its_own_head_is_plain_transformers(command, tmp_path, bert):
    from transformers import AutoModelForSequenceClassification

    model = ("model=hf", f"model.path={bert}", "model.pretrained_on=unknown", "model.train=lora")
    trained(command, *write_classes(tmp_path), *model, "optimizer=dp_adam")
    assert command("export", str(run_of(tmp_path)), str(tmp_path / "out")).returncode == 0
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[2, 10, 5, 3]])
    with torch.no_grad():
        torch.testing.assert_close(dpopt.load(run_of(tmp_path))(ids), network(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["dp_adam", "dp_microadam"])
def test_a_language_model(command, tmp_path, llama, optimizer):
    """Its loss falls on what it has seen, and the perplexity of a record is exp of its mean loss."""
    model = ("model=hf", f"model.path={llama}", "model.pretrained_on=unknown", "dataset.max_length=9")
    trained(command, *write_pairs(tmp_path), *model, f"optimizer={optimizer}", "optimizer.lr=0.03", "diagnostics=true")
    lines = [line.split(",") for line in (run_of(tmp_path) / "metrics.csv").read_text().splitlines()]
    first, last = (dict(zip(lines[0], line, strict=True)) for line in (lines[1], lines[-1]))
    assert float(last["test/loss"]) < float(first["test/loss"]) < 2.8
    assert float(last["test/perplexity"]) == pytest.approx(torch.tensor(float(last["test/loss"])).exp().item())
    assert float(last["private/full_length"]) == pytest.approx(2 / 3)  # of 8, 9 and 10 tokens
    done = command("evaluate", str(run_of(tmp_path)), "--write", "8")
    assert re.match(r"BLEU [\d.]+, ROUGE-L [01]\.\d+ over 3 prompts\n\nprompt  name film\nmodel ", done.stdout), (
        done.stderr
    )
    assert "people  a good film is good" in done.stdout


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
def test_an_adapter_for_peft(command, tmp_path, llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = ("model=hf", f"model.path={llama}", "model.pretrained_on=unknown", "model.train=lora", "model.lora.rank=2")
    trained(command, *write_pairs(tmp_path), *model, "dataset.max_length=16", "optimizer=dp_adam", "optimizer.lr=0.03")
    run = run_of(tmp_path)
    assert command("export", str(run), str(tmp_path / "adapter"), "--adapter").returncode == 0
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter").eval()
    ids = torch.tensor([[13, 5, 4, 6]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(llama).eval()(ids).logits
        found = dpopt.load(run)(ids)
        torch.testing.assert_close(found, network(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.pretrained_on=null",), r"nothing says what the initial weights were trained on.*model.pretrained_on"),
        (("dataset.max_length=64",), r"texts have 64 tokens and the model reads 40: set dataset.max_length=40"),
        (("dataset.collection=tickets", "model.pretrained_on='web, tickets'"), r"trained on tickets, whose records"),
        (("model.path=no/such_model", "dataset.tokenizer=x"), r"model.path=no/such_model can neither be read here nor"),
        (("model.train=some",), r"model.train=some"),
        (
            ("dataset.tokenizer={large}",),
            r"makes the token 19 and the model knows 15: set dataset.tokenizer to the model's",
        ),
        (("+model.lora.rnk=3", "model.train=lora"), r"model.lora has no rnk: it takes rank, alpha and targets"),
    ],
    ids=["origin", "too long", "collection", "no weights", "train", "tokens", "lora"],
)
def test_refusals(command, tmp_path, bert, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment is read at import
    if "tokenizer={large}" in words[0]:
        large = make_tokenizer(tmp_path / "large", shift=7)
        words = [word.replace("{large}", str(large)) for word in words]
    model = ["model=hf", f"model.path={bert}", "model.pooling=mean", "model.pretrained_on=unknown"]
    done = command("train", *write_classes(tmp_path), *model, "optimizer=dp_adam", *COMMON, *words)
    assert done.returncode != 0
    found = " ".join(done.stderr.split())
    assert re.search(message, found), found
    assert not list((tmp_path / "runs").glob("*/result.json"))
