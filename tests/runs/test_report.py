"""The report: one well-formed page, in which nothing that comes from files is more than text."""

import base64
import csv
import hashlib
import json
import re

import pytest
from made_runs import make_run, make_three_groups
from strict_html import EVIL, Page

from dpopt.runs.comparison import find_runs
from dpopt.runs.markdown import to_html
from dpopt.runs.report import report


def page_of(folder, measure: str = "test_accuracy") -> tuple[Page, str]:
    text = report(find_runs([str(folder)])[0], measure)
    return Page(text), text


def test_groups_curves_cards_and_configurations(tmp_path):
    make_three_groups(tmp_path)
    page, text = page_of(tmp_path)
    assert "7 runs in 3 groups" in text and "+3.00 [+0.52, +5.48] (n = 3)" in page.told("td")
    assert len(page.all_of("details")) == 14 and "_target_: torch.optim.SGD" in page.told("pre")
    assert page.told("strong").count("(ε = 8)") == 7 and "90.00%, ε = 8" in page.told("span")
    assert len(page.all_of("polyline")) == 3 and len(page.all_of("polygon")) == 2
    assert "optimizer=adam (mean ± sd of 3 seeds)" in page.told("li")


def test_values_at_the_pointer(tmp_path):
    make_three_groups(tmp_path)
    data = json.loads(re.search(r'id="curves">(.*?)</script>', page_of(tmp_path)[1])[1])
    assert data["steps"] == [20, 40] and data["values"][0] == ["72 ± 2", "92 ± 2"]
    assert data["values"][2] == ["30", "50"] and data["x"][0] < data["x"][1] < data["width"]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    make_three_groups(tmp_path)
    page, text = page_of(tmp_path)
    assert not any({"src", "href", "action"} & set(attributes) for _, attributes in page.elements)
    assert not re.search(r"https?://|url\(|@import", text)
    policy = next(a["content"] for a in page.all_of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_what_comes_from_files_is_text(tmp_path):
    evil = EVIL + "</script></pre></details>"
    directory = make_run(tmp_path, EVIL, 0.9, tag=evil, data_dir=evil)
    make_run(tmp_path, "b", 0.9, 1, optimizer={"_target_": f"x.{evil}", "lr": evil})
    (directory / "privacy_card.md").write_text(f"# {evil}\n\n**{evil}`{evil}\n\n| {evil} | `{evil}` |\n- {evil}\n")
    page, _ = page_of(tmp_path)
    assert [attributes.get("type") for attributes in page.all_of("script")] == ["application/json", None]
    assert not page.all_of("img") and not any(name.startswith("on") for _, found in page.elements for name in found)
    assert EVIL in page.told("summary") and evil in page.told("h3") and evil in page.told("pre")
    assert f"tag={evil}" in page.told("li") and f"tag={evil}" in page.told("th")


@pytest.mark.parametrize("with_curves", [True, False])
def test_the_name_of_a_measure_is_text(with_curves, tmp_path):
    directory = make_run(tmp_path, EVIL, 0.9)
    result = json.loads((directory / "result.json").read_text())
    (directory / "result.json").write_text(json.dumps(result | {EVIL: 0.5}))
    (directory / "metrics.csv").unlink()
    if with_curves:
        with (directory / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", EVIL.replace("_", "/", 1)), (20, 0.5)])
    page, _ = page_of(tmp_path, EVIL)
    assert not page.all_of("img") and len(page.all_of("script")) == 1 + with_curves
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert EVIL in page.told("th") and EVIL in page.told("figcaption" if with_curves else "p")
    assert all(attributes["data-head"] == EVIL for attributes in page.all_of("td")[:1])


def test_the_strict_reader_finds_what_is_wrong():
    for wrong in ("<p><b></p></b>", "<p>", "</p>", '<p id="a" id="b"></p>', "<br/>"):
        with pytest.raises(AssertionError):
            Page(f"<!DOCTYPE html>\n{wrong}")


def test_runs_without_metrics_or_card_are_shown_all_the_same(tmp_path):
    directory = make_run(tmp_path, "a", 0.9)
    (directory / "metrics.csv").unlink()
    (directory / "privacy_card.md").unlink()
    page, text = page_of(tmp_path)
    assert "No curves: " in text and "There is no privacy_card.md" in text and not page.all_of("svg")


def test_values_that_are_not_numbers_are_not_drawn(tmp_path):
    directory = make_run(tmp_path, "a", 0.9)
    (directory / "metrics.csv").write_text("step,test/accuracy\n20,.5\n40,nan\n")
    page, _ = page_of(tmp_path)
    assert len(page.all_of("circle")) == 1 and "nan" not in str(page.elements)
    (directory / "metrics.csv").write_text("step,test/accuracy\n20,nan\n")
    assert "No curves: all values" in page_of(tmp_path)[1]


def test_raw_statistics_are_marked(tmp_path):
    make_run(tmp_path, "a", 0.9)
    assert "do not publish this page" not in page_of(tmp_path)[1]
    (tmp_path / "a" / "metrics.csv").write_text("step,private/holdout_accuracy\n20,.5\n")
    path = tmp_path / "a" / "result.json"
    path.write_text(path.read_text().replace('"test_accuracy"', '"private/holdout_accuracy"'))
    page, text = page_of(tmp_path, "private/holdout_accuracy")
    assert "do not publish this page" in text and len(page.all_of("polyline")) == 1


def test_markdown_of_a_card():
    text = "# A `b`\n\n**(ε = 8**)-x\n\n| | |\n|---|---|\n| N | 5 < 6 |\n\n## More\n\n- one;\n- **two `c`** and\n  on."
    assert to_html(text).split("\n") == [
        "<h3>A <code>b</code></h3>",
        "<p><strong>(ε = 8</strong>)-x</p>",
        '<table class="card"><tbody>',
        '<tr><th scope="row">N</th><td>5 &lt; 6</td></tr>',
        "</tbody></table>",
        "<h4>More</h4>",
        "<ul>",
        "<li>one;</li>",
        "<li><strong>two <code>c</code></strong> and on.</li>",
        "</ul>",
    ]


def test_the_command(command, tmp_path):
    make_three_groups(tmp_path / "runs")
    make_run(tmp_path / "runs", "d", 0.3, 9, status="interrupted")
    done = command("report", "runs/*", "-o", "page.html")
    assert done.returncode == 0 and done.stdout == "wrote page.html: 7 runs\n", done.stderr
    assert done.stderr == "left out, because they are not finished: d\n"
    Page((tmp_path / "page.html").read_text())
    for words, meant in ((["none*"], "matches no finished run"), (["runs", "-o", "no/p.html"], "cannot be written")):
        done = command("report", *words)
        assert done.returncode == 1 and meant in done.stderr and done.stderr.count("\n") == 1
