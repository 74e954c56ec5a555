"""The site that `make docs` builds: strict, on four shelves, whole, and loading nothing from the network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import dpopt

pytestmark = pytest.mark.slow


def build(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_nothing_comes_from_the_network(site):
    found = pages(site)
    assert len(found) > 30
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert not {name: match[0] for name, text in found.items() if (match := loaded.search(text))}
    assert loaded.search('<link rel="stylesheet" href="https://fonts.example.com/css">')


def test_four_shelves_and_a_search(site):
    tabs = re.findall(r'<li class="md-tabs__item.*?</li>', pages(site)["index.html"], re.DOTALL)
    assert [re.sub(r"<[^>]+>", "", tab).strip() for tab in tabs] == ["Start", "Guides", "Concepts", "Reference"]
    index = json.loads((site / "search/search_index.json").read_text())
    assert any("MicroAdam" in page["title"] for page in index["docs"])
    script = (site / "search/search_index.js").read_text()  # the same where there is no server
    assert json.loads(script.removeprefix("var __index = ")) == index
    assert "file_search.js" in pages(site)["index.html"] and (site / "file_search.js").exists()


def test_lists_are_lists(site):
    """A list right below a line of text is no list to this renderer, though GitHub shows one."""
    swallowed = re.compile(r"<p>[^<]*\n(?:- |1\. )")
    assert not [name for name, text in pages(site).items() if swallowed.search(text)]
    assert swallowed.search("<p>Some text:\n- a\n- b</p>")


def public_names() -> set[str]:
    found = {f"dpopt.{name}" for name in dpopt.__all__ if name not in ("clipping", "data", "filters", "models")}
    for module in ("clipping", "data", "filters", "models", "optim"):
        found |= {f"dpopt.{module}.{name}" for name in getattr(dpopt, module).__all__}
    return found - {"dpopt.optim", "dpopt.schedules"} | {"dpopt.schedules.ClipRate"}


def test_every_public_name_is_in_the_reference(site):
    text = "".join(page for name, page in pages(site).items() if name.startswith("api/"))
    assert len(public_names()) > 40
    shown = re.sub(r"<[^>]+>", " ", text)
    missing = {name for name in public_names() if not re.search(rf"\b{name.rpartition('.')[2]}\b", shown)}
    assert not missing
    assert 'id="dpopt.PrivacyPlan.calibrate"' in text and 'id="dpopt.optim.MicroAdam"' in text


def test_a_broken_link_or_a_page_on_no_shelf_ends_the_build(tmp_path):
    """Links within pages, to headings, and out of docs/ are checked."""
    text = (ROOT / "mkdocs.yml").read_text().replace("docs_dir: docs", f"docs_dir: {tmp_path / 'docs'}")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        re.sub(r"nav:\n.*", "nav: [page.md]\n", text, flags=re.DOTALL).replace(
            "scripts/docs_hooks.py", str(ROOT / "scripts/docs_hooks.py")
        )
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/page.md"
    for body, meant in (
        ("Fine.", ""),
        ("[x](missing.md)", "missing.md"),
        ("[x](#nowhere)", "nowhere"),
        ("[x](../dpopt/missing.md)", "missing.md"),
    ):
        page.write_text(f"# Page\n\n{body}\n")
        done = build(tmp_path / "site", config)
        assert (done.returncode == 0) == (meant == "") and meant in done.stderr, (body, done.stderr)
    page.write_text("# Page\n")
    (tmp_path / "docs/other.md").write_text("# Other\n")
    done = build(tmp_path / "site", config)
    assert done.returncode != 0 and "other.md" in done.stderr
