"""What a protocol comes to: datasets, seconds per step, budgets, runs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from nnunet_ssl.benchmark.folder import ids_of_others, reserve
from nnunet_ssl.benchmark.runs import epoch_seconds, kind, quoted, trainings
from nnunet_ssl.errors import UserError

SECONDS = {"Labels only": 0.1, "CPS": 0.4, "CPS + SHTA": 0.5, "More labels": 0.1}


def write_measurements(benchmark, write_times, seconds=SECONDS):
    """Short runs of each row (or stage) with these seconds per step; their first epoch is slow."""
    stages = {stage.name: stage for row in benchmark.protocol.rows for stage in row.stages}
    rounds = benchmark.protocol.measure.rounds
    for name, second in ((name, second) for name, second in seconds.items() if name in stages):
        for number in range(rounds):
            folder = benchmark.home / "measure" / f"{kind(stages[name])}_{number}"
            if not folder.exists():
                slow = 10 * second + 0.1 * (rounds > 1)  # other work, in another epoch of each round
                write_times(folder, [50.0, *([slow, 10 * second] if number % 2 else [10 * second, slow])])


def lengths(benchmark, budget):
    """Row -> steps of an epoch, of the first seed."""
    table = list(benchmark.tables())[budget]
    return {run.row.name: run.iterations for run in table.of_seed(0)}


# ------------------------------------------------------------------------------------------------------- datasets


def test_a_dataset_for_each_labeled_set_and_order_by_the_first_free_ids(given, make_benchmark, tmp_path):
    (tmp_path / "raw" / "Dataset501_OfTheUser").mkdir()
    (tmp_path / "preprocessed" / "Dataset503_OfTheUser").mkdir()
    assert make_benchmark(given).ids == {
        "2 labeled, order 0": 500, "2 labeled, order 1": 502, "4 labeled, order 0": 504, "4 labeled, order 1": 505,
    }  # fmt: skip


def test_seeds_share_a_dataset_unless_the_protocol_says_otherwise(given, make_benchmark):
    given["data"]["order_by_seed"] = False
    assert make_benchmark(given).ids == {"2 labeled": 500, "4 labeled": 501}


def test_ids_stay_when_a_protocol_grows(given, make_benchmark):
    before = make_benchmark(given).ids
    given["seeds"], given["labeled"] = [5, 0, 1], [1, 2]
    after = make_benchmark(given, ids=before).ids
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after) == 9


def test_ids_of_other_benchmarks_are_not_taken(given, make_benchmark, tmp_path):
    """Their folders come into being one by one, those of self-training after days."""
    given["rows"][1]["self_training"] = {"rounds": 2}
    given["budgets"] = [{"steps": 240}]
    raw, homes = tmp_path / "raw", [tmp_path / name for name in ("one", "other")]
    taken = []
    for home in homes:
        benchmark = make_benchmark(given, reserved=ids_of_others(raw, home) if raw.exists() else ())
        home.mkdir()
        (home / "datasets.json").write_text(json.dumps(benchmark.ids))
        reserve(raw, home, benchmark.all_ids())
        taken.append(benchmark.all_ids())
    assert [len(ids) for ids in taken] == [8, 8]  # four datasets, and two of self-training for each seed
    assert not taken[0] & taken[1]
    assert ids_of_others(raw, homes[0]) == taken[1]
    (homes[1] / "datasets.json").unlink()  # the other is gone
    reserve(raw, homes[0], taken[0])
    assert ids_of_others(raw, homes[1]) == taken[0]
    assert ids_of_others(raw, homes[0]) == set()


def test_no_free_id(given, make_benchmark, tmp_path):
    given["first_id"] = 998
    with pytest.raises(UserError, match="no dataset id from 998 to 999 is free"):
        make_benchmark(given)


# -------------------------------------------------------------------------------------------------------- budgets


def test_equal_steps(given, make_benchmark):
    assert set(lengths(make_benchmark(given), 0).values()) == {20}  # 80 steps in 4 epochs


@pytest.mark.parametrize(("epochs", "every"), [(4, 1), (40, 2), (1000, 50), (4000, 50)])
def test_a_killed_training_loses_a_twentieth_at_most(epochs, every, given, make_benchmark):
    """Without a curve, and of what comes before it too: the last epoch's checkpoint alone would be none to resume."""
    given["rows"][1]["pretrained_by"] = "nnUNetTrainerMAE"
    benchmark = make_benchmark(given | {"epochs": epochs, "curve": [1], "budgets": [{"steps": 8000}]})
    run = next(run for run in benchmark.queue() if run.row.name == "CPS")
    for settings in (benchmark.settings(run), benchmark.pretraining_settings(run)):
        assert settings["save_every"] == every < epochs


def test_measuring_takes_turns_forwards_and_backwards(given, make_benchmark):
    given["rows"][1] |= {"settings": {}}
    labels, cps, shta = "nnUNetTrainerLabeledOnly", "nnUNetTrainerCPS", "nnUNetTrainerSHTA_CPS"
    assert make_benchmark(given).rounds() == [
        f"{labels}_0", f"{cps}_0", f"{shta}_0", f"{shta}_1", f"{cps}_1", f"{labels}_1",
    ]  # fmt: skip
    # more labels make no step longer, other settings may
    given["rows"][3] = {"name": "Wide", "trainer": cps, "settings": {"cps_weight": 2}}
    benchmark = make_benchmark(given)
    assert len(benchmark.rounds()) == 8
    (wide,) = (name for name in benchmark.timed() if name.startswith(f"{cps}_"))
    assert benchmark.measuring_settings(wide) == {
        "seed": 0, "num_iterations_per_epoch": 10, "num_val_iterations_per_epoch": 1, "cps_weight": 2, "save_every": 4,
    }  # fmt: skip
    given["budgets"] = [{"steps": 80}]
    assert make_benchmark(given).rounds() == []


def test_equal_time_follows_from_the_measured_seconds(given, make_benchmark, write_times):
    given["budgets"].append({"minutes": 0.4})
    benchmark = make_benchmark(given)
    assert set(lengths(benchmark, 1).values()) == {20, None}  # CPS is the run with equal steps; the others wait
    write_measurements(benchmark, write_times)
    assert benchmark.seconds_per_step() == pytest.approx(
        {row.key: SECONDS[row.name] for row in benchmark.protocol.rows}
    )
    # 80 steps of CPS are 32 s: 4 epochs of 8 s
    assert lengths(benchmark, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 16, "More labels": 80}
    # 24 s: 4 epochs of 6 s
    assert lengths(benchmark, 2) == {"Labels only": 60, "CPS": 15, "CPS + SHTA": 12, "More labels": 60}


def test_epochs_count_alike_since_a_method_may_have_phases(given, make_benchmark, write_times):
    """Half as long in the second epoch that is timed; a round that other work disturbed counts where it was faster."""
    benchmark = make_benchmark(given)
    for number, seconds in enumerate(([9.0, 2.0, 1.5], [9.0, 4.0, 1.0])):
        write_times(benchmark.home / "measure" / f"nnUNetTrainerLabeledOnly_{number}", seconds)
    assert benchmark.seconds_per_step()["labels_only"] == pytest.approx((2.0 + 1.0) / 2 / 10)


@pytest.mark.parametrize("change", [{"labeled": [1, 2]}, {"seeds": [1]}])
def test_what_is_added_or_removed_is_timed_on_the_first_dataset(given, make_benchmark, write_times, change):
    benchmark = make_benchmark(given)
    assert benchmark.measured_on() == (500, 0)
    write_measurements(benchmark, write_times)
    for folder in (benchmark.home / "measure").iterdir():
        (folder / "settings.json").write_text(json.dumps({"seed": 0}))
    later = make_benchmark(given | change, ids=benchmark.ids)
    assert later.measured_on() == (500, 0)
    assert later.seconds_per_step() == pytest.approx(benchmark.seconds_per_step())
    given["rows"].append({"name": "URPC", "trainer": "nnUNetTrainerURPC"})
    later = make_benchmark(given | change, ids=benchmark.ids)
    assert later.measuring_settings("nnUNetTrainerURPC")["seed"] == 0


def test_seconds_are_kept_for_what_is_added_later(given, make_benchmark, write_times):
    """Another first seed, or a row that trains as another did, is no reason to measure again."""
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times)
    before, rounds = lengths(benchmark, 1), benchmark.rounds()
    given["seeds"] = [2, 0, 1]
    given["rows"][0] = {"name": "Another name", "trainer": "nnUNetTrainerLabeledOnly"}
    benchmark = make_benchmark(given)
    assert benchmark.rounds() == rounds
    assert lengths(benchmark, 1) == {"Another name": 80, **{name: before[name] for name in list(before)[1:]}}
    given["rows"].append({"name": "URPC", "trainer": "nnUNetTrainerURPC"})
    added = set(make_benchmark(given).rounds()) - set(rounds)
    assert added == {"nnUNetTrainerURPC_0", "nnUNetTrainerURPC_1"}


def test_budgets_in_steps_are_never_the_same(given, make_benchmark):
    given["budgets"] = [{"steps": 400}, {"steps": 404}]
    benchmark = make_benchmark(given)
    assert set(lengths(benchmark, 1).values()) == {101}
    assert len(benchmark.queue()) == 2 * 2 * 4


def test_seconds_that_the_protocol_gives_are_not_measured(given, make_benchmark, write_times):
    given["measure"] = {"seconds": SECONDS}
    benchmark = make_benchmark(given)
    assert benchmark.rounds() == []
    write_measurements(benchmark, write_times, dict.fromkeys(SECONDS, 1.0))  # what lies there changes nothing
    assert lengths(benchmark, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 16, "More labels": 80}


def test_offline_work_comes_off_the_time_of_another_row(given, make_benchmark, write_times):
    given["rows"][2]["offline"] = 0.1  # 6 of the 32 s of CPS
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times)
    assert lengths(benchmark, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 13, "More labels": 80}
    assert set(lengths(benchmark, 0).values()) == {20}  # equal steps are equal
    given["rows"][2]["offline"] = 1
    with pytest.raises(UserError, match=r"offline work of CPS \+ SHTA takes longer than the time of CPS in made_up"):
        lengths(make_benchmark(given), 1)


def test_a_measurement_that_is_not_complete_does_not_count(given, make_benchmark, write_times):
    benchmark = make_benchmark(given)
    write_times(benchmark.home / "measure" / "nnUNetTrainerLabeledOnly_0", [2.0, 1.0, 1.0])
    write_times(benchmark.home / "measure" / "nnUNetTrainerLabeledOnly_1", [2.0, 1.0])
    assert benchmark.seconds_per_step() == {}


def test_a_measurement_too_short_for_the_log(given, make_benchmark, write_times):
    """nnU-Net writes hundredths of a second."""
    benchmark = make_benchmark(given)
    for number in range(2):
        write_times(benchmark.home / "measure" / f"nnUNetTrainerLabeledOnly_{number}", [0.5, 0.0, 0.0])
    with pytest.raises(UserError, match=r"short runs of Labels only took no time .* measure.iterations"):
        benchmark.seconds_per_step()


def test_the_row_that_sets_the_time_is_not_trained_twice(given, make_benchmark, write_times):
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times)
    assert len(benchmark.queue()) == 2 * (4 + 3)  # seeds x (rows with equal steps + rows with equal time but CPS)
    first, second = (next(run for run in table.runs if run.row.name == "CPS") for table in benchmark.tables())
    assert first == second


@pytest.mark.parametrize(("seconds", "same"), [(0.42, True), (0.36, False)])
def test_a_difference_below_the_accuracy_of_measuring_is_no_run_of_its_own(
    given, make_benchmark, write_times, seconds, same
):
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times, {**SECONDS, "CPS + SHTA": seconds})
    equal, timed = (next(run for run in table.runs if run.row.name == "CPS + SHTA") for table in benchmark.tables())
    assert equal.iterations == 20
    assert timed.iterations == (20 if same else 22)  # 19.05 steps are as good as 20, 22.2 are not
    assert (timed == equal) is same


def test_a_run_that_was_started_keeps_its_length(given, make_benchmark, write_times):
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times)
    run = benchmark.run("time_of_cps/cps_shta_2labeled_seed0")
    run.folder.mkdir(parents=True)
    (run.folder / "settings.json").write_text(json.dumps({"num_iterations_per_epoch": 7}))
    assert lengths(benchmark, 1)["CPS + SHTA"] == 7


def test_epochs_that_were_repeated_count_once(write_times, tmp_path):
    write_times(tmp_path, [3.0, 2.0])
    log = next(tmp_path.rglob("training_log*"))
    # nnU-Net does not pad the numbers in its names: by name, 10 o'clock comes before 9
    later = log.with_name("training_log_2026_1_1_09_00_00.txt")
    later.write_text("x: Epoch 1 \nx: Epoch time: 5.0 s \nx: Epoch 2 \nx: Epoch time: 7.0 s \nx: Epoch 3 ")
    os.utime(log, (1, 1))
    assert trainings(tmp_path) == [log.parent]
    assert epoch_seconds(log.parent) == {0: 3.0, 1: 5.0, 2: 7.0}


# ------------------------------------------------------------------------------------------------ several trainings


def test_self_training_shares_the_budget_among_its_trainings(given, make_benchmark, write_times, tmp_path):
    again = {"rounds": 3, "student": "nnUNetTrainerURPC", "options": ["--keep", 0.5]}
    given["rows"][3] = {"name": "Self-training", "trainer": "nnUNetTrainerWarps", "self_training": again}
    given["seeds"] = [0]
    (tmp_path / "raw" / "Dataset502_OfTheUser").mkdir()
    benchmark = make_benchmark(given)
    # three ids in a row for each of its runs
    assert benchmark.ids == {
        "2 labeled, order 0": 500,
        "steps80/self-training_2labeled_seed0": 503,
        "time_of_cps/self-training_2labeled_seed0": 506,
    }
    write_measurements(
        benchmark, write_times, {"CPS": 0.4, "Self-training": 0.1, "Self-training, student": 0.1, **SECONDS}
    )
    assert (lengths(benchmark, 0)["Self-training"], lengths(benchmark, 1)["Self-training"]) == (5, 20)
    run = benchmark.run("steps80/self-training_2labeled_seed0")
    assert benchmark.settings(run)["num_iterations_per_epoch"] == 5
    assert run.steps_before == 60
    assert (benchmark.dataset_of(run), benchmark.last_dataset(run)) == (500, 505)
    model = benchmark.model(run)
    assert (model.parent.name, model.name) == ("Dataset505_*", "nnUNetTrainerURPC_4epochs__nnUNetPlans__3d_fullres")
    assert make_benchmark(given, ids=benchmark.ids).ids == benchmark.ids


def test_pretraining_shares_the_budget(given, make_benchmark, write_times):
    settings = {"warped_share": 0.5}
    given["rows"][1] = {
        "name": "Pretrained", "trainer": "nnUNetTrainerLabeledOnly", "pretrained_by": "nnUNetTrainerMAE",
        "settings": settings,
    }  # fmt: skip
    given["budgets"][1] = {"minutes": 2}
    given["rows"][2]["against"] = "Labels only"
    benchmark = make_benchmark(given)
    seconds = {"Pretrained": 0.1, "Pretrained, pretraining": 0.05, "Labels only": 0.1, "CPS + SHTA": 0.5}
    write_measurements(benchmark, write_times, seconds)
    # half of the steps each: of 80, and of those that fit into 120 s, of which one takes 0.1 s and the other 0.05 s
    assert (lengths(benchmark, 0)["Pretrained"], lengths(benchmark, 1)["Pretrained"]) == (10, 200)
    run = benchmark.run("steps80/pretrained_2labeled_seed0")
    assert run.steps_before == 40
    pretraining = benchmark.pretraining_settings(run)
    assert pretraining == {
        "seed": 0, "num_iterations_per_epoch": 10, "num_val_iterations_per_epoch": 1, "save_every": 1,
    }  # fmt: skip
    assert benchmark.settings(run) == {**pretraining, **settings, "keep_epochs": [2, 4]}
    assert [benchmark.model(run, stage).name.split("__")[0] for stage in (0, 1)] == [
        "nnUNetTrainerMAE_4epochs", "nnUNetTrainerLabeledOnly_4epochs",
    ]  # fmt: skip
    assert set(benchmark.ids) == {f"{labeled} labeled, order {seed}" for labeled in (2, 4) for seed in (0, 1)}


def test_each_kind_of_training_is_timed_once(given, make_benchmark, write_times):
    given["rows"][1] |= {"settings": {}, "self_training": {"student": "nnUNetTrainerURPC", "rounds": 2}}
    given["rows"][3] |= {"pretrained_by": "nnUNetTrainerMAE"}
    given["budgets"] = [{"minutes": 4}]
    given["measure"] |= {"rounds": 1, "seconds": {"Labels only": 0.1}}
    benchmark = make_benchmark(given)
    assert [stage.name for stage in benchmark.timed().values()] == [
        "CPS", "CPS, student", "CPS + SHTA", "More labels, pretraining",
    ]  # fmt: skip
    seconds = {"CPS": 0.4, "CPS, student": 0.1, "CPS + SHTA": 0.5, "More labels, pretraining": 0.06}
    write_measurements(benchmark, write_times, seconds)
    means = {"labels_only": 0.1, "cps": 0.2, "cps_shta": 0.5, "more_labels": 0.08}
    assert benchmark.seconds_per_step() == pytest.approx(means)
    assert lengths(benchmark, 0) == {"Labels only": 600, "CPS": 100, "CPS + SHTA": 120, "More labels": 375}


def test_a_run_keeps_its_length_from_its_pretraining_on(given, make_benchmark, write_times):
    given["rows"] = [{"name": "Pretrained", "trainer": "nnUNetTrainerCPS", "pretrained_by": "nnUNetTrainerMAE"}]
    given["budgets"] = [{"minutes": 2}]
    benchmark = make_benchmark(given)
    write_measurements(benchmark, write_times, {"Pretrained": 0.1, "Pretrained, pretraining": 0.1})
    run = benchmark.queue()[0]
    run.folder.mkdir(parents=True)
    (run.folder / "pretraining.json").write_text(json.dumps(benchmark.pretraining_settings(run)))
    given["measure"]["seconds"] = {"Pretrained": 0.4}
    assert lengths(make_benchmark(given), 0)["Pretrained"] == run.iterations == 150


def test_a_shell_reads_the_words_as_they_are_meant(tmp_path):
    folder = tmp_path / "a b" / "Dataset501_Made"
    folder.mkdir(parents=True)
    words = [tmp_path / "a b" / "Dataset501_*", "it's", "*", "CPS + SHTA", "x_*"]
    line = "printf '%s\n' " + quoted(*words)
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(folder), *words[1:]]
