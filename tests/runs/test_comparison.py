"""Groups of runs that differ only in their seed, and their statistics, against figures worked out by hand."""

import math

import pytest
from made_runs import make_run, make_three_groups

from dpopt.runs.comparison import curve, find_runs, group_runs, summarize, table

T2 = 4.302652729911275  # Student's t, 97.5%, two degrees of freedom


def groups_of(folder):
    return group_runs(find_runs([str(folder)])[0])


def test_groups_and_their_statistics(tmp_path):
    make_three_groups(tmp_path)
    groups = groups_of(tmp_path)
    assert [group.label for group in groups] == ["optimizer=microadam", "optimizer=adam", "optimizer=sgd"]
    first, second, third = summarize(groups, "test_accuracy")
    assert (first.mean, first.sd, first.half) == pytest.approx((92, 2, T2 * 2 / 3**0.5))
    assert first.difference is None and third.difference is None and math.isnan(third.sd) and math.isnan(third.half)
    # Differences 3, 2 and 4 points: their deviation is 1, smaller than the groups' own.
    assert second.difference == pytest.approx((3, T2 / 3**0.5, 3)) and second.sd == pytest.approx(2.6457513)
    head, lines = table([first, second, third], "test_accuracy")
    assert head[1] == "test_accuracy in %" and lines[0][1:4] == ["92.00 ± 2.00", "3", "[87.03, 96.97]"]
    assert lines[1][5] == "+3.00 [+0.52, +5.48] (n = 3)" and lines[2][1:] == ["50.00", "1", "–", "8", "–"]


def test_only_shared_seeds_are_paired(tmp_path):
    for seed in range(3):
        make_run(tmp_path, f"a{seed}", 0.9 + seed / 100, seed)
        make_run(tmp_path, f"b{seed}", 0.8 + seed / 100, seed + 1, clip_norm=2.0)
    one, two = summarize(groups_of(tmp_path), "test_accuracy")
    assert (one.group.label, two.group.label) == ("clip_norm=1", "clip_norm=2")
    assert two.difference[0] == pytest.approx(-11) and two.difference[2] == 2 and math.isnan(two.difference[1])
    assert table([one, two], "test_accuracy")[1][1][5] == "-11.00 (n = 2: no interval)"


def test_labels_name_arguments_of_one_component(tmp_path):
    for name, lr in (("a", 1e-3), ("b", 3e-3)):
        make_run(tmp_path, name, 0.9, optimizer={"_target_": "torch.optim.Adam", "lr": lr}, epochs=None)
    make_run(tmp_path, "c", 0.9, optimizer={"_target_": "torch.optim.SGD", "lr": 3e-3}, delta=1e-6)
    assert [group.label for group in groups_of(tmp_path)] == [
        "optimizer=adam optimizer.lr=0.001 delta=0.0001",
        "optimizer=adam optimizer.lr=0.003 delta=0.0001",
        "optimizer=sgd delta=1e-06",
    ]


def test_settings_of_speed_and_place_make_no_group(tmp_path):
    make_run(tmp_path, "a", 0.9, 0, micro_batch=32, output_dir="elsewhere")
    make_run(tmp_path, "b", 0.8, 1, micro_batch=64, engine="vmap")
    assert len(groups_of(tmp_path)) == 1


def test_the_same_run_twice_is_refused(tmp_path):
    make_run(tmp_path / "x", "a", 0.9)
    make_run(tmp_path / "y", "a", 0.8)
    with pytest.raises(ValueError, match=r"x/a and .*y/a are the same run, seed 0"):
        group_runs(find_runs([f"{tmp_path}/*"])[0])


def test_other_data_are_refused_where_they_can_be_told(tmp_path):
    make_run(tmp_path / "x", "a", 0.9, 0)
    make_run(tmp_path / "x", "b", 0.9, 1, data_mac="b", fingerprint_key="another machine")
    assert len(groups_of(tmp_path / "x")) == 1
    make_run(tmp_path / "x", "c", 0.9, 2, data_mac="b")
    with pytest.raises(ValueError, match=r"x/a and .*x/c have one configuration and other training data"):
        groups_of(tmp_path / "x")


def test_unfinished_and_damaged_runs_are_told_apart(tmp_path):
    make_run(tmp_path, "a", 0.9)
    make_run(tmp_path, "b", 0.9, status="interrupted")
    (make_run(tmp_path, "c", 0.9) / "result.json").write_text("{")
    runs, others = find_runs([str(tmp_path / "*")])
    assert [run.directory.name for run in runs] == ["a"] and [path.name for path in others] == ["b", "c"]
    with pytest.raises(ValueError, match=r"b matches no finished run"):
        find_runs([str(tmp_path / "b")])


def test_what_a_run_lacks_is_named(tmp_path):
    directory = make_run(tmp_path, "a", 0.9)
    groups = groups_of(tmp_path)
    with pytest.raises(ValueError, match=r"a/result\.json holds no number private/holdout_accuracy"):
        summarize(groups, "private/holdout_accuracy")
    with pytest.raises(ValueError, match=r"metrics\.csv has no column test/loss"):
        curve(groups[0], "test_loss")
    (directory / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"metrics\.csv cannot be read"):
        curve(groups[0], "test_accuracy")


def test_curves_use_the_steps_that_all_runs_have(tmp_path):
    make_run(tmp_path, "a", 0.9, 0)
    make_run(tmp_path, "b", 0.8, 1)
    with (tmp_path / "b" / "metrics.csv").open("a") as file:
        file.write("60,.99\n")
    (group,) = groups_of(tmp_path)
    assert curve(group, "test_accuracy") == [
        (20, pytest.approx(65), pytest.approx(50**0.5)),
        (40, pytest.approx(85), pytest.approx(50**0.5)),
    ]
    (tmp_path / "a" / "metrics.csv").write_text("step,test/accuracy\n7,.5\n")
    with pytest.raises(ValueError, match="no step in common"):
        curve(group, "test_accuracy")


def test_a_diverged_run_is_said(tmp_path):
    make_run(tmp_path, "a", math.nan, 0)
    make_run(tmp_path, "b", 0.8, 1)
    make_run(tmp_path, "c", 0.8, 2)
    assert table(summarize(groups_of(tmp_path), "test_accuracy"), "test_accuracy")[1][0][1:4] == ["diverged", "3", "–"]
