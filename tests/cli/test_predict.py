"""dpopt predict and dpopt export: from a run to classes of new files, and to a folder that can be handed on."""

import csv
import io
import json
import re

import pytest
import torch
import yaml
from PIL import Image

import dpopt
from dpopt import data

pytestmark = pytest.mark.slow
SHORT = ("experiment=quickstart", "steps=12", "batch_size=64", "eval_every=12", "epsilon=1", "ledger=off")


@pytest.fixture
def run(command, tmp_path):
    done = command("train", *SHORT, "logger=csv")
    assert done.returncode == 0, done.stderr
    (found,) = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    return found


@pytest.fixture
def photos(tmp_path):
    """The first ten test digits, in two folders, as image files; the test set they are from."""
    _, test = data.digits().load(tmp_path, torch.device("cpu"), 0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, pixels in enumerate(test.inputs[:10]):
        Image.fromarray(pixels[0].numpy()).save(folder / ("more" if number > 6 else "") / f"{number}.png")
    return folder, test


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def likely(model, test, count=10):
    inputs, _ = next(iter(test.subset(torch.arange(count)).plain(count)))
    with torch.no_grad():
        return model(inputs).double().softmax(1).max(1)


def test_a_folder_of_images(command, run, photos):
    folder, test = photos
    done = command("predict", str(run), str(folder))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = table(done.stdout)
    assert [row["path"] for row in rows] == [
        *(str(folder / f"{number}.png") for number in range(7)),
        *(str(folder / f"more/{number}.png") for number in (7, 8, 9)),
    ]
    expected = likely(dpopt.load(run), test)
    assert [row["class"] for row in rows] == [str(number) for number in expected.indices.tolist()]
    found = torch.tensor([float(row["probability"]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected.values, rtol=0, atol=1e-6)
    assert len(set(rows[0]["probability"] for row in rows)) == 1 and len({row["probability"] for row in rows}) > 3
    one = command("predict", str(run), str(folder / "3.png"), "-o", str(folder / "found.csv"))
    assert one.returncode == 0 and "1 predictions" in one.stdout
    (alone,) = table((folder / "found.csv").read_text())
    assert (alone["path"], alone["class"]) == (rows[3]["path"], rows[3]["class"])
    assert float(alone["probability"]) == pytest.approx(float(rows[3]["probability"]), abs=2e-6)  # rounded alike or not


def test_broken_and_other_files_do_not_stop_the_others(command, run, photos):
    folder, _ = photos
    whole = command("predict", str(run), str(folder)).stdout
    (folder / "0a.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    Image.new("RGB", (20, 10)).save(folder / "wide.png")
    (folder / ".hidden").write_text("not looked at")
    done = command("predict", str(run), str(folder))
    assert done.returncode == 1 and done.stdout == whole
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"{folder}/0a.png cannot be read as an image (")
    assert second == f"{folder}/notes.txt cannot be read as an image (no image format is recognized)"
    assert third == f"{folder}/wide.png is 20×10 where the model was trained on 8×8: resize it first"


def test_what_stops_all_predictions_is_one_sentence(command, run, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("a\n1\n")
    for words, message in (
        ((run, tmp_path / "nowhere"), "nowhere is missing"),
        ((run, tmp_path / "empty"), "holds nothing to predict"),
        ((run, tmp_path / "rows.csv"), "because the run's model reads images: name a folder or an image"),
        ((tmp_path, photos[0]), "holds no model.safetensors"),
    ):
        done = command("predict", *map(str, words))
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_an_exported_folder_stands_for_the_run(command, run, photos, tmp_path):
    folder, test = photos
    out = tmp_path / "out"
    done = command("export", str(run), str(out))
    assert done.returncode == 0, done.stderr
    names = {"README.md", "config.yaml", "model.safetensors", "preprocessing.json", "privacy_card.html"}
    assert {path.name for path in out.iterdir()} == names | {"privacy_card.md"}
    assert (out / "privacy_card.md").read_text() == (run / "privacy_card.md").read_text()
    described = json.loads((out / "preprocessing.json").read_text())
    assert described["classes"] == [str(number) for number in range(10)]
    assert described["inputs"]["mean"] == [0.29] and described["inputs"]["shape"] == [1, 8, 8]
    assert str(tmp_path) not in (out / "config.yaml").read_text()
    before = command("predict", str(run), str(folder)).stdout
    for path in run.iterdir():
        path.unlink()
    assert command("predict", str(out), str(folder)).stdout == before
    described["classes"] = [f"digit {number}" for number in range(10)]
    (out / "preprocessing.json").write_text(json.dumps(described))
    assert "digit " in command("predict", str(out), str(folder)).stdout
    expected = likely(dpopt.load(out), test)
    assert expected.indices.tolist() == [int(row["class"]) for row in table(before)]
    again = command("export", str(out), str(out))
    assert again.returncode == 1 and "is not empty: name a new folder" in again.stderr


def test_where_the_data_of_an_exported_folder_are(command, run, tmp_path, monkeypatch):
    """Not where they were on another machine."""
    from dpopt.training import finished

    seen, load = [], finished.load_test_set
    monkeypatch.setattr(
        finished, "load_test_set", lambda config, task: seen.append(config.data_dir) or load(config, task)
    )
    assert command("export", str(run), str(tmp_path / "out")).returncode == 0
    monkeypatch.delenv("DPOPT_DATA_DIR", raising=False)
    assert command("evaluate", str(tmp_path / "out")).returncode == 0
    monkeypatch.setenv("DPOPT_DATA_DIR", "there")
    for words in ((), ("here",), ("data_dir=here",)):
        assert command("evaluate", str(tmp_path / "out"), *words).returncode == 0
    assert seen == ["data", "there", "here", "here"]


def test_the_model_card_is_one_of_the_hub(command, run, tmp_path):
    assert command("export", str(run), str(tmp_path / "out")).returncode == 0
    result = json.loads((run / "result.json").read_text())
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\n") and text.count("\n---\n") == 1
    front = yaml.safe_load(text[4:].partition("\n---\n")[0])
    assert front["library_name"] == "dpopt" and "license" not in front
    assert front["tags"] == ["differential-privacy", "dpopt", "digits"]
    privacy = front["privacy"]
    assert privacy["epsilon"] == result["epsilon"] and privacy["delta"] == 1e-4 and privacy["steps"] == 12
    assert privacy["guarantee"] == result["guarantee"] and privacy["unit"].startswith("one training example")
    assert f"Accuracy {result['test_accuracy']:.2%}" in text and "\n## Privacy card: " in text
    titles = re.findall(r"^#+ .*$", text, re.MULTILINE)
    assert titles[0] == f"# {run.name}" and not any(title.startswith("# ") for title in titles[1:])


def test_a_control_claims_nothing_in_its_model_card(command, tmp_path):
    assert command("train", *SHORT, "privacy=none", "epsilon=null", "logger=csv").returncode == 0
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    assert command("export", str(run), str(tmp_path / "out")).returncode == 0
    front = yaml.safe_load((tmp_path / "out/README.md").read_text()[4:].partition("\n---\n")[0])
    assert front["privacy"] == {"guarantee": "none: no clipping, no noise"}
    done = command("export", str(run), str(tmp_path / "adapter"), "--adapter")
    assert done.returncode == 1 and "leave --adapter out" in done.stderr and not (tmp_path / "adapter").exists()


def test_names_of_class_folders_are_kept(command, tmp_path):
    for part, count in (("train", 6), ("val", 2)):
        for number, name in enumerate(("cat", "dog, big")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (200 * number, 30 * index, 90)).save(
                    tmp_path / f"pets/{part}/{name}/{index}.png"
                )
    done = command(
        "train",
        *("dataset=imagenet", "dataset.folder=pets", "dataset.image_size=32", "dataset.train_size=12"),
        *("dataset.classes=2", "model=cnn5", "batch_size=3", "steps=2", "delta=1e-2", "logger=csv", "ledger=off"),
        *(f"data_dir={tmp_path}", "workers=0", "eval_every=2"),
    )
    assert done.returncode == 0, done.stderr
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    assert json.loads((run / "result.json").read_text())["classes"] == ["cat", "dog, big"]
    test = tmp_path / "pets/val"
    rows = table(command("predict", str(run), str(test)).stdout)
    assert len(rows) == 4 and {row["class"] for row in rows} <= {"cat", "dog, big"}
    assert command("export", str(run), str(tmp_path / "out")).returncode == 0
    (tmp_path / "pets/train").rename(tmp_path / "gone")
    assert table(command("predict", str(tmp_path / "out"), str(test)).stdout) == rows


MODULE = """
import torch
from torch import nn
from dpopt.data.datasets import DataSpec


class Row:
    reads, columns = "row", ("age", "height")

    def __call__(self, row):
        return torch.tensor([float(row["age"]) / 100, float(row["height"]) / 200])

    def to_json(self):
        return {"reads": "row", "columns": self.columns}


def people(size=240):
    def load(data_dir, device, workers):
        inputs = torch.rand(size, 2, generator=torch.Generator().manual_seed(0))
        targets = (inputs[:, 0] > 0.5).long()
        return (inputs[40:], targets[40:]), (inputs[:40], targets[:40])

    return DataSpec("people", size - 40, 2, (2,), load, inputs=Row(), class_names=("young", "old"))


def net(num_classes):
    return nn.Linear(2, num_classes)
"""


def test_rows_of_an_own_table(command, tmp_path, monkeypatch):
    (tmp_path / "my_table.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    done = command(
        "train",
        *("dataset._target_=my_table.people", "~dataset.augment", "~dataset.image_size", "model._target_=my_table.net"),
        *("batch_size=50", "steps=60", "delta=1e-3", "logger=csv", "ledger=off"),
        *("optimizer=dp_adam", "optimizer.lr=0.3", "eval_every=60", "epsilon=8"),
    )
    assert done.returncode == 0, done.stderr
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    (tmp_path / "new.csv").write_text("height,age\n180,2\n170,x\n160,98\n150\n")
    done = command("predict", str(run), str(tmp_path / "new.csv"))
    assert [(row["path"][-1], row["class"]) for row in table(done.stdout)] == [("1", "young"), ("3", "old")]
    first, second = done.stderr.splitlines()
    assert first == f"{tmp_path}/new.csv:2 could not convert string to float: 'x'"
    assert second.startswith(f"{tmp_path}/new.csv:4 cannot be read (TypeError: ") and done.returncode == 1
    assert command("export", str(run), str(tmp_path / "out")).returncode == 0
    described = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert described == {
        "classes": ["young", "old"],
        "inputs": {"shape": [2], "reads": "row", "columns": ["age", "height"]},
    }
    front = yaml.safe_load((tmp_path / "out/README.md").read_text()[4:].partition("\n---\n")[0])
    assert "pipeline_tag" not in front
    assert "`dpopt predict FOLDER TABLE.csv` names the class of every row" in (tmp_path / "out/README.md").read_text()
    monkeypatch.setattr("my_table.Row", lambda: None)
    done = command("predict", str(run), str(tmp_path / "new.csv"))
    assert done.returncode == 1 and "people does not say how a file becomes an input" in done.stderr
