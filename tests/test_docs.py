"""The documentation, followed to the letter."""

import inspect
import json
import pkgutil
import re
import shlex
import sys
import tokenize
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from string import Template

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import nn

import dpopt
from dpopt.cli import VERBS
from dpopt.config.schema import Config
from dpopt.grad_sample import rules
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.runs.identity import NOT_IDENTITY
from dpopt.tables import spec

pytestmark = pytest.mark.slow
NAME = r"`(dpopt(?:\.\w+)+|[A-Z]\w+\.\w+)"  # in backticks


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def follow(command, text: str):
    arguments = shlex.split(text.replace("\\\n", " "))
    assert arguments[:2] == ["python", "run.py"]
    done = command("train", *arguments[2:])
    assert done.returncode == 0, done.stderr
    return done


def test_own_data(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    library, keyed, module, _ = blocks("docs/own_data.md", "python")
    scope = {"dpopt": dpopt, "inputs": torch.randn(500, 3), "targets": torch.zeros(500)}
    exec(library.replace("...", "assert len(list(batch)) >= 1"), scope)
    assert scope["plan"].dataset_size == 500
    exec(keyed, scope)
    dataset = scope["Jittered"](scope["inputs"], scope["targets"])
    inputs, _, mask = next(iter(next(dpopt.poisson_batches(dataset, scope["plan"], views=2, micro_batch=400))))
    assert not torch.equal(inputs[mask][:, 0], inputs[mask][:, 1])
    (tmp_path / "my_data.py").write_text(module)
    follow(command, blocks("docs/own_data.md", "bash")[0])
    assert list(tmp_path.glob("runs/blobs-cnn-*/result.json"))


def test_tables_on_the_page_of_own_data(tmp_path, monkeypatch):
    """Regression, several labels and class weights learn what the columns say, under ε = 1 each."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    scaled = torch.rand(4000, 3, generator=generator)
    price = (scaled[:, 0] + scaled[:, 1]) / 2
    rows = ["rooms,area,age,price,garden,garage,sold"]
    for x, y in zip(scaled, price, strict=True):
        rooms, area, age = (x * torch.tensor([10, 400, 100])).tolist()
        labels = f"{int(x[0] > 0.5)},{int(x[2] > 0.5)},{int(x[1] > 0.7)}"
        rows.append(f"{rooms:.3f},{area:.3f},{age:.3f},{1e6 * y:.1f},{labels}")
    (tmp_path / "houses.csv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    scope = {}
    exec(blocks("docs/own_data.md", "python")[3], scope)
    with torch.no_grad():
        error = F.mse_loss(scope["price"](scaled)[:, 0], price)
        tags = (scope["tags"](scaled) > 0) == (scaled[:, [0, 2]] > 0.5)
        sold = scope["sold"](scaled).argmax(1) == (scaled[:, 1] > 0.7).long()
    assert error < 0.5 * price.var() and tags.float().mean(0).min() > 0.8 and sold.float().mean() > 0.8
    card = (tmp_path / "card/privacy_card.md").read_text()
    assert "| privacy unit | one house |" in card and "(ε = 0.9999, δ = 1e-05)" in card


def test_own_model(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    repair, module = blocks("docs/own_model.md", "python")
    scope = {"dpopt": dpopt, "model": nn.Sequential(nn.Conv2d(1, 48, 3), nn.BatchNorm2d(48))}
    exec(repair, scope)
    assert scope["model"][1].num_groups == 24 and scope["fixed"].remaining == []
    (tmp_path / "my_model.py").write_text(module)
    follow(command, blocks("docs/own_model.md", "bash")[0])
    assert list(tmp_path.glob("runs/digits-digit_mlp-*/result.json"))


def test_add_an_optimizer(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    page = "docs/add_an_optimizer.md"
    assert len((ROOT / page).read_text().splitlines()) <= 40
    folder = tmp_path / "conf" / "optimizer"
    folder.mkdir(parents=True)
    for name, text in zip(("dp_rmsprop", "dp_lion"), blocks(page, "yaml"), strict=True):
        (folder / f"{name}.yaml").write_text(text)
    (tmp_path / "lion.py").write_text(blocks(page, "python")[0])
    names = "optimizer=dp_rmsprop,dp_lion"
    done = command("train", "--config-dir", str(tmp_path / "conf"), "-m", "experiment=quickstart", names, "steps=40")
    assert done.returncode == 0, done.stderr
    for name in ("rmsprop", "lion"):
        result = next(tmp_path.glob(f"runs/digits-cnn-{name}-*/result.json"))
        assert json.loads(result.read_text())["test_accuracy"] > 0.4


def test_the_page_of_methods_is_up_to_date():
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_methods

    assert (ROOT / "docs/methods.md").read_text() == make_methods.page(), "run python scripts/make_methods.py"


def test_the_page_of_keys_is_up_to_date_and_whole():
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_keys

    page = make_keys.page()
    assert (ROOT / "docs/keys.md").read_text() == page, "run python scripts/make_keys.py"
    assert all(f"| `{f.name}`" in page for f in fields(Config))


def test_the_keys_outside_of_a_runs_identity_are_listed():
    listed = re.search(r"Not in the hash: `([a-z_\s]+)`", (ROOT / "docs" / "concepts.md").read_text())[1].split()
    assert set(listed) == NOT_IDENTITY


def test_readme_library_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(b for b in blocks("README.md", "python") if "PrivateGradient" in b)
    inputs = torch.randn(1000, 4)
    scope = {
        "dataset": (inputs, (inputs[:, 0] > 0).long()),
        "model": nn.Linear(4, 2),
        "loss_fn": nn.functional.cross_entropy,
    }
    exec(example, scope)
    assert scope["private"].step == scope["plan"].steps
    assert "| privacy unit | one photo |" in (tmp_path / "card/privacy_card.md").read_text()


def test_layer_rule():
    """The rule on the page holds its own against a loop over examples, and the page is short."""
    text = (ROOT / "docs/layer_rule.md").read_text()
    scope = {}
    exec(blocks("docs/layer_rule.md", "python")[0], scope)
    try:
        model = nn.Sequential(nn.Linear(4, 5), scope["Scale"](5), nn.Linear(5, 3))
        engine = GradSampler(model, F.cross_entropy)
        validate_against_autograd(engine, torch.randn(3, 2, 4), torch.arange(3))
        assert engine.fallbacks == [] and len(text.splitlines()) <= 34 and text.count("\n", text.index("```")) <= 30
        rules.RULES[scope["Scale"]] = rules.Rule(lambda module, a, g: {"factor": g.flatten(1, -2).sum(1)})
        with pytest.raises(ValueError, match=r"1\.factor"):
            validate_against_autograd(GradSampler(model, F.cross_entropy), torch.randn(3, 2, 4), torch.arange(3))
    finally:
        del rules.RULES[scope["Scale"]]


PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments/results").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or page.parent.joinpath(target).exists(), target


def test_every_page_of_results_is_linked():
    """By README, docs or another page of results."""
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text())
        if not target.startswith("http")
    }
    results = {*(ROOT / "experiments/results").rglob("*.md"), *(ROOT / "experiments/results").rglob("*.png")}
    assert results and results <= linked


def classes() -> dict[str, type]:
    """The classes of the package, by name."""
    names = [m.name for m in pkgutil.walk_packages(dpopt.__path__, "dpopt.") if "triton" not in m.name]
    return {n: c for m in names for n, c in vars(import_module(m)).items() if inspect.isclass(c)}


def exists(name: str, known: dict[str, type]) -> bool:
    """Whether `dpopt.a.b` or `Class.attribute` is there; a class of others counts."""
    first, *rest = name.split(".")
    if first == "dpopt":
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
        return True
    if first not in known:
        return True
    kind, attribute = known[first], rest[0]
    return (
        hasattr(kind, attribute) or re.search(rf"\b(self\.)?{attribute}\b *[:=]", inspect.getsource(kind)) is not None
    )


def test_names_in_docs_and_docstrings_exist():
    known = classes()
    pages = [*(ROOT / "dpopt").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    found = {(str(page), name) for page in pages for name in re.findall(NAME, page.read_text())}
    assert len(found) > 20 and not [(page, name) for page, name in found if not exists(name, known)]
    assert not exists("PrivateGradient.inform", known) and not exists("dpopt.optim.Adamm", known)


BANNED = re.compile(
    r"\b(beside|anew|for want of|what it comes to|is forgotten|is told|in words|answers for|of its own|nobody wants)\b",
    re.IGNORECASE,
)


def prose(path: Path) -> str:
    """What people read in a file: of Python, comments and strings."""
    if path.suffix != ".py":
        return path.read_text()
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with path.open("rb") as file:
        return "\n".join(token.string for token in tokenize.tokenize(file.readline) if token.type in kinds)


def banned(text: str) -> list[str]:
    return [found[0] for found in BANNED.finditer(re.sub(r"\s+", " ", text))]


def test_plain_words():
    """Words that readers stumble over; the field has better ones: compared with, next to, its own."""
    files = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "run.py")
    ]
    for folder, kinds in (
        ("docs", "md ipynb"),
        ("dpopt", "py c"),
        ("scripts", "py"),
        ("conf", "yaml"),
        ("tests", "py"),
    ):
        files += [path for kind in kinds.split() for path in (ROOT / folder).rglob(f"*.{kind}")]
    files += (ROOT / "experiments").glob("*.yaml")
    # A privacy card there is what a run wrote, and models.md quotes refusals.
    results = (ROOT / "experiments/results").rglob("*.md")
    files += [path for path in results if "card" not in path.name and path.name != "models.md"]
    files.remove(Path(__file__))
    found = {str(path.relative_to(ROOT)): words for path in files if (words := banned(prose(path)))}
    assert len(files) > 100 and not found, found


def test_a_banned_word_is_found(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('for word in words:\n    x = f"it is\\n told {word} anew"  # nobody\n')
    assert banned(prose(path)) == ["anew"]
    assert banned("It lies\nbeside what Is\n  Told, for words") == ["beside", "Is Told"]


def commands() -> list[tuple[str, list[str]]]:
    """The words of every command in README and docs/ that calls dpopt, with its page; comments and pipes cut off."""
    found = []
    for page in (path for path in PAGES if "results" not in path.parts):
        for block in blocks(str(page.relative_to(ROOT)), "bash"):
            variables: dict[str, str] = {}
            for line in block.replace("\\\n", " ").splitlines():
                if assigned := re.match(r'([A-Z]+)="(.*)"$', line):
                    variables[assigned[1]] = Template(assigned[2]).safe_substitute(variables)
                    continue
                words = shlex.split(Template(line).safe_substitute(variables), comments=True)
                if (words[:2] == ["python", "run.py"]) or words[:1] == ["torchrun"]:
                    words = ["dpopt", "train", *words[words.index("run.py") + 1 :]]
                if words[:1] == ["dpopt"]:
                    found.append((str(page.relative_to(ROOT)), words[1:]))
    return found


def composed(words: list[str]) -> list[spec.Job]:
    """The runs of a command; an error where a key or a group is unknown."""
    return spec.expand((*words, "tag=docs"), column="tag", label="docs")


def test_commands_in_docs_name_verbs_groups_and_keys_that_exist():
    trained = 0
    for page, (verb, *words) in commands():
        assert verb in VERBS or verb == "--help", (page, verb)
        words = [word for word in words if word not in ("-m", "...") and not word.startswith("hydra")]
        own = any("_target_" in word or "mine" in word or word.startswith("-") for word in words)
        if verb in ("train", "estimate") and not own:
            trained += len(composed(words))
    assert trained > 60


@pytest.mark.parametrize("word", ["optimzer=dp_adam", "optimizer=dp_adamx", "epslon=8", "model=cnn model.width=3"])
def test_a_wrong_word_in_a_command_is_found(word):
    with pytest.raises(Exception, match=r"optimzer|dp_adamx|epslon|width"):
        composed(["experiment=quickstart", *word.split()])
