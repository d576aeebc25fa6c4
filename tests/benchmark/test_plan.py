"""The steps of a protocol: datasets, budgets, runs, and the commands."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from nnunet_ssl.benchmark.plan import epoch_seconds, quoted, trainings
from nnunet_ssl.benchmark.protocol import row_key
from nnunet_ssl.errors import UserError

SECONDS = {"Labels only": 0.1, "CPS": 0.4, "CPS + SHTA": 0.5, "More labels": 0.1}


def write_measurements(plan, write_times, seconds=SECONDS):
    """Short runs of each row with these seconds a step; their first epoch is slow."""
    for name, second in seconds.items():
        for number in range(2):
            folder = plan.home / "measure" / f"{row_key(name)}_2labeled_seed0_{number}"
            write_times(folder, [50.0, 10 * second + 0.1, 10 * second])


def lengths(plan, budget):
    """Row -> steps of an epoch, of the first seed."""
    runs = plan.runs(plan.protocol.budgets[budget], 2)
    return {run.row.name: run.iterations for run in runs if run.seed == 0}


# ------------------------------------------------------------------------------------------------------- datasets


def test_a_dataset_for_each_labelled_set_and_order_by_the_first_free_ids(given, make_plan, tmp_path):
    (tmp_path / "raw" / "Dataset501_OfTheUser").mkdir()
    (tmp_path / "preprocessed" / "Dataset503_OfTheUser").mkdir()
    assert make_plan(given).ids == {
        "2 labelled, order 0": 500, "2 labelled, order 1": 502, "4 labelled, order 0": 504, "4 labelled, order 1": 505,
    }  # fmt: skip


def test_seeds_share_a_dataset_unless_the_protocol_says_otherwise(given, make_plan):
    given["data"]["order_by_seed"] = False
    assert make_plan(given).ids == {"2 labelled": 500, "4 labelled": 501}


def test_ids_stay_when_a_protocol_grows(given, make_plan):
    before = make_plan(given).ids
    given["seeds"], given["labeled"] = [5, 0, 1], [1, 2]
    after = make_plan(given, ids=before).ids
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after) == 9


def test_no_free_id(given, make_plan, tmp_path):
    given["first_id"] = 998
    with pytest.raises(UserError, match="no dataset id from 998 to 999 is free"):
        make_plan(given)


def test_preparation(given, make_plan, tmp_path):
    given |= {"planning": ["-overwrite_target_spacing", 2, 2, 2], "plans": "small"}
    given["shrink"] = {"features": [4, 6, 8], "patch_size": [8, 8, 8]}
    steps = list(make_plan(given).prepare())
    assert [step.key for step in steps if step.key.endswith("500")] == [
        "dataset_500", "plan_500", "shrink_500", "unlabeled_500",
    ]  # fmt: skip
    split, plan, shrink, unlabeled = (" ".join([*step.words, *step.machine]) for step in steps[:4])
    assert split == (
        f"nnUNetv2_ssl_split -d 1 -o 500 --labeled 2 --val 1 --test {tmp_path / 'test.txt'} --seed 0 "
        "--name made_up_2_labelled_order_0"
    )
    assert plan == (
        "nnUNetv2_plan_and_preprocess -d 500 -c 3d_fullres -overwrite_target_spacing 2 2 2 "
        "-overwrite_plans_name small -np 2 -npfp 2"
    )
    assert "shrink_plans(sys.argv[1], '3d_fullres', [4, 6, 8], patch_size=[8, 8, 8], batch_size=2)" in shrink
    assert unlabeled == "nnUNetv2_ssl_preprocess -d 500 -c 3d_fullres -p small -np 2"
    # only rows without unlabelled images learn from the sets with four labels
    assert not [step for step in steps if step.key in ("unlabeled_502", "unlabeled_503")]


def test_a_script_makes_the_datasets(given, make_plan, tmp_path):
    given["data"] = {"script": "prepare_la.py", "options": ["--x", "{data}/x.txt"], "order_by_seed": True}
    given["rows"][3]["labeled"] = "all"
    made = [step for step in make_plan(given).prepare() if step.key.startswith("dataset")]
    data, script = tmp_path / "DATA", tmp_path / "scripts" / "prepare_la.py"
    end = f"--data {data} --x {data}/x.txt -np 2"
    assert [" ".join([*step.words, *step.machine]) for step in made] == [
        f"python {script} --labeled 2 -d 500 --seed 0 {end}",
        f"python {script} --labeled 2 -d 501 --seed 1 {end}",
        f"python {script} --labeled all -d 502 --seed 0 {end}",  # they have no order
    ]
    assert str(data) not in " ".join(made[0].words)  # data that lie elsewhere are the same data


# -------------------------------------------------------------------------------------------------------- budgets


def test_equal_steps(given, make_plan):
    assert set(lengths(make_plan(given), 0).values()) == {20}  # 80 steps in 4 epochs


def test_measuring_takes_turns_forwards_and_backwards(given, make_plan):
    keys = [step.key for step in make_plan(given).measure()]
    assert keys == [
        f"measure_{row}_2labeled_seed0_{number}"
        for number, rows in enumerate([("labels_only", "cps", "cps_shta"), ("cps_shta", "cps", "labels_only")])
        for row in rows
    ]
    # more labels make no step longer, other settings may
    given["rows"][3] = {"name": "Wide", "trainer": "nnUNetTrainerCPS", "settings": {"cps_weight": 2}}
    assert "measure_wide_2labeled_seed0_0" in [step.key for step in make_plan(given).measure()]
    given["budgets"] = [{"steps": 80}]
    assert not list(make_plan(given).measure())


def test_equal_time_follows_from_the_measured_seconds(given, make_plan, write_times):
    given["budgets"].append({"minutes": 0.4})
    plan = make_plan(given)
    assert set(lengths(plan, 1).values()) == {20, None}  # CPS is the run with equal steps; the others wait
    write_measurements(plan, write_times)
    assert plan.seconds_a_step() == pytest.approx({row.key: SECONDS[row.name] for row in plan.protocol.rows})
    # 80 steps of CPS are 32 s: 4 epochs of 8 s
    assert lengths(plan, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 16, "More labels": 80}
    # 24 s: 4 epochs of 6 s
    assert lengths(plan, 2) == {"Labels only": 60, "CPS": 15, "CPS + SHTA": 12, "More labels": 60}


def test_seconds_are_kept_for_what_is_added_later(given, make_plan, write_times):
    """Another first seed, or a row that trains as another did, is no reason to measure again."""
    plan = make_plan(given)
    plan.home.mkdir()
    plan.keep_seconds()
    assert not (plan.home / "seconds_a_step.json").exists()
    write_measurements(plan, write_times)
    plan.keep_seconds()
    before = lengths(plan, 1)
    given["seeds"] = [2, 0, 1]
    given["rows"][0] = {"name": "Another name", "trainer": "nnUNetTrainerLabeledOnly"}
    plan = make_plan(given)
    assert not list(plan.measure())
    assert lengths(plan, 1) == {"Another name": 80, **{name: before[name] for name in list(before)[1:]}}
    given["rows"].append({"name": "URPC", "trainer": "nnUNetTrainerURPC"})
    assert {step.key for step in make_plan(given).measure()} == {"measure_urpc_2labeled_seed2_0",
                                                                 "measure_urpc_2labeled_seed2_1"}  # fmt: skip


def test_budgets_in_steps_are_never_the_same(given, make_plan):
    given["budgets"] = [{"steps": 400}, {"steps": 404}]
    plan = make_plan(given)
    assert set(lengths(plan, 1).values()) == {101}
    assert len(plan.queue()) == 2 * 2 * 4


def test_seconds_that_the_protocol_gives_are_not_measured(given, make_plan, write_times):
    given["measure"] = {"seconds": SECONDS}
    plan = make_plan(given)
    assert not list(plan.measure())
    write_measurements(plan, write_times, dict.fromkeys(SECONDS, 1.0))  # what lies there changes nothing
    assert lengths(plan, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 16, "More labels": 80}


def test_offline_work_comes_off_the_time_of_another_row(given, make_plan, write_times):
    given["rows"][2]["offline"] = 0.1  # 6 of the 32 s of CPS
    plan = make_plan(given)
    write_measurements(plan, write_times)
    assert lengths(plan, 1) == {"Labels only": 80, "CPS": 20, "CPS + SHTA": 13, "More labels": 80}
    assert set(lengths(plan, 0).values()) == {20}  # equal steps are equal
    given["rows"][2]["offline"] = 1
    with pytest.raises(UserError, match=r"offline work of CPS \+ SHTA takes longer than the time of CPS in made_up"):
        lengths(make_plan(given), 1)


def test_a_measurement_that_is_not_complete_does_not_count(given, make_plan, write_times):
    plan = make_plan(given)
    write_times(plan.home / "measure" / "cps_2labeled_seed0_0", [2.0, 1.0, 1.0])
    write_times(plan.home / "measure" / "cps_2labeled_seed0_1", [2.0, 1.0])
    assert plan.seconds_a_step() == {}


def test_a_measurement_of_another_labelled_set_is_another(given, make_plan, write_times):
    plan = make_plan(given)
    write_measurements(plan, write_times)
    given["labeled"] = [3, 2]
    assert make_plan(given).seconds_a_step() == {}
    given["labeled"] = [2, 3]
    assert make_plan(given).seconds_a_step() == plan.seconds_a_step() != {}


def test_a_measurement_too_short_for_the_log(given, make_plan, write_times):
    """nnU-Net writes hundredths of a second."""
    plan = make_plan(given)
    for number in range(2):
        write_times(plan.home / "measure" / f"cps_2labeled_seed0_{number}", [0.5, 0.0, 0.0])
    with pytest.raises(UserError, match=r"short runs of CPS took no time .* measure.iterations"):
        plan.seconds_a_step()


def test_the_row_that_sets_the_time_is_not_trained_twice(given, make_plan, write_times):
    plan = make_plan(given)
    write_measurements(plan, write_times)
    assert len(plan.queue()) == 2 * (4 + 3)  # seeds x (rows with equal steps + rows with equal time but CPS)
    first, second = (next(run for run in plan.runs(budget, 2) if run.row.name == "CPS")
                     for budget in plan.protocol.budgets)  # fmt: skip
    assert first == second


@pytest.mark.parametrize(("seconds", "same"), [(0.42, True), (0.36, False)])
def test_a_difference_below_the_accuracy_of_measuring_is_no_run_of_its_own(
    given, make_plan, write_times, seconds, same
):
    plan = make_plan(given)
    write_measurements(plan, write_times, {**SECONDS, "CPS + SHTA": seconds})
    equal, timed = (next(run for run in plan.runs(budget, 2) if run.row.name == "CPS + SHTA")
                    for budget in plan.protocol.budgets)  # fmt: skip
    assert equal.iterations == 20
    assert timed.iterations == (20 if same else 22)  # 19.05 steps are as good as 20, 22.2 are not
    assert (timed == equal) is same


def test_a_run_that_was_started_keeps_its_length(given, make_plan, write_times):
    plan = make_plan(given)
    write_measurements(plan, write_times)
    run = next(run for run in plan.runs(plan.protocol.budgets[1], 2) if run.row.name == "CPS + SHTA")
    run.folder.mkdir(parents=True)
    (run.folder / "settings.json").write_text(json.dumps({"num_iterations_per_epoch": 7}))
    assert lengths(plan, 1)["CPS + SHTA"] == 7


def test_epochs_that_were_repeated_count_once(write_times, tmp_path):
    write_times(tmp_path, [3.0, 2.0])
    log = next(tmp_path.rglob("training_log*"))
    # nnU-Net does not pad the numbers in its names: by name, 10 o'clock comes before 9
    later = log.with_name("training_log_2026_1_1_09_00_00.txt")
    later.write_text("x: Epoch 1 \nx: Epoch time: 5.0 s \nx: Epoch 2 \nx: Epoch time: 7.0 s \nx: Epoch 3 ")
    os.utime(log, (1, 1))
    assert trainings(tmp_path) == [log.parent]
    assert epoch_seconds(log.parent) == {0: 3.0, 1: 5.0, 2: 7.0}


# ------------------------------------------------------------------------------------------------------- commands


def test_the_commands_of_a_run(given, make_plan, tmp_path):
    given["settings"] = {"num_val_iterations_per_epoch": 3}
    plan = make_plan(given)
    run = next(run for run in plan.runs(plan.protocol.budgets[0], 2) if run.row.name == "CPS" and run.seed == 1)
    train, *others = plan.steps_of(run)
    folder = tmp_path / "home" / "runs" / "steps80" / "cps_2labeled_seed1"
    assert " ".join([*train.words, *train.machine]) == (
        "nnUNetv2_train 501 3d_fullres 0 -p nnUNetPlans -tr nnUNetTrainerCPS_4epochs -device cpu"
    )
    assert train.settings == (
        folder / "settings.json",
        {
            "seed": 1,
            "num_iterations_per_epoch": 20,
            "num_val_iterations_per_epoch": 3,
            "cps_weight": 0.5,
            "save_every": 2,
            "keep_epochs": [2, 4],
        },
    )
    assert train.variables["nnUNet_ssl_config"] == str(folder / "settings.json")
    assert {step.variables.get("nnUNet_results") for step in (train, others[0])} == {str(folder / "results")}
    timed = next(plan.measure())
    assert {step.variables.get("OMP_NUM_THREADS") for step in (train, others[0], timed)} == {"1"}
    raw = tmp_path / "raw" / "Dataset501_*"
    assert [" ".join(step.words) for step in others] == [
        f"nnUNetv2_predict -i {raw}/imagesTs -o {folder}/test_epoch2 -d 501 -c 3d_fullres -f 0 -p nnUNetPlans "
        "-tr nnUNetTrainerCPS_4epochs -chk checkpoint_epoch2.pth",
        f"nnUNetv2_ssl_evaluate -ref {raw}/labelsTs -djfile {raw}/dataset.json --metrics dice "
        f"-pred {folder}/test_epoch2 -o {folder}/evaluated_epoch2",
        f"nnUNetv2_predict -i {raw}/imagesTs -o {folder}/test_epoch4 -d 501 -c 3d_fullres -f 0 -p nnUNetPlans "
        "-tr nnUNetTrainerCPS_4epochs -chk checkpoint_epoch4.pth",
        f"nnUNetv2_ssl_evaluate -ref {raw}/labelsTs -djfile {raw}/dataset.json --metrics dice hd95 "
        f"-pred {folder}/test_epoch4 -o {folder}/evaluated_epoch4",
    ]


def test_self_training_shares_the_budget_among_its_trainings(given, make_plan, write_times, tmp_path):
    again = {"rounds": 3, "student": "nnUNetTrainerLabeledOnly", "options": ["--keep", 0.5]}
    given["rows"][3] = {"name": "Self-training", "trainer": "nnUNetTrainerWarps", "self_training": again}
    given["seeds"] = [0]
    (tmp_path / "raw" / "Dataset502_OfTheUser").mkdir()
    plan = make_plan(given)
    # three ids in a row for each of its runs
    assert plan.ids == {
        "2 labelled, order 0": 500,
        "steps80/self-training_2labeled_seed0": 503,
        "time_of_cps/self-training_2labeled_seed0": 506,
    }
    write_measurements(plan, write_times, {**SECONDS, "Self-training": 0.1})
    assert (lengths(plan, 0)["Self-training"], lengths(plan, 1)["Self-training"]) == (5, 20)
    run = next(run for run in plan.runs(plan.protocol.budgets[0], 2) if run.row.self_training)
    train, again, predict, *_ = plan.steps_of(run)
    assert train.settings[1]["num_iterations_per_epoch"] == 5
    assert run.steps_before == 60
    assert " ".join([*again.words, *again.machine]) == (
        "nnUNetv2_ssl_pseudolabel -d 500 -c 3d_fullres -f 0 -p nnUNetPlans -tr nnUNetTrainerWarps_4epochs "
        "-o 503 --rounds 3 --student nnUNetTrainerLabeledOnly_4epochs --keep 0.5 -device cpu -np 2"
    )
    assert again.variables == train.variables
    words = " ".join(predict.words)
    assert "Dataset500_*/imagesTs" in words
    assert " -d 505 " in words
    assert "-tr nnUNetTrainerLabeledOnly_4epochs" in words
    assert plan.model(run).name == "nnUNetTrainerLabeledOnly_4epochs__nnUNetPlans__3d_fullres"
    assert make_plan(given, ids=plan.ids).ids == plan.ids


def test_pretraining_shares_the_budget_and_hands_on_its_weights(given, make_plan, write_times):
    settings = {"warped_share": 0.5}
    given["rows"][1] = {
        "name": "Pretrained", "trainer": "nnUNetTrainerLabeledOnly", "pretrained_by": "nnUNetTrainerMAE",
        "settings": settings,
    }  # fmt: skip
    given["budgets"][1] = {"minutes": 2}
    given["rows"][2]["against"] = "Labels only"
    plan = make_plan(given)
    write_measurements(plan, write_times, {**SECONDS, "Pretrained": 0.1, "Pretrained, pretraining": 0.05})
    # half of the steps each: of 80, and of those that fit into 120 s, of which one takes 0.1 s and the other 0.05 s
    assert (lengths(plan, 0)["Pretrained"], lengths(plan, 1)["Pretrained"]) == (10, 200)
    run = next(run for run in plan.runs(plan.protocol.budgets[0], 2) if run.row.pretrained_by)
    assert run.steps_before == 40
    pretrain, train, *_ = plan.steps_of(run)
    results = f"{run.folder}/results/Dataset500_*"
    weights = f"{results}/nnUNetTrainerMAE_4epochs__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
    assert " ".join(pretrain.words) == "nnUNetv2_train 500 3d_fullres 0 -p nnUNetPlans -tr nnUNetTrainerMAE_4epochs"
    assert " ".join(train.words) == (
        "nnUNetv2_train 500 3d_fullres 0 -p nnUNetPlans -tr nnUNetTrainerLabeledOnly_4epochs "
        f"-pretrained_weights {weights}"
    )
    assert pretrain.settings[0] != train.settings[0]
    assert pretrain.settings[1] == {
        "seed": 0, "num_iterations_per_epoch": 10, "num_val_iterations_per_epoch": 1, "save_every": 4,
    }  # fmt: skip
    assert train.settings[1] == {
        **pretrain.settings[1], **settings, "save_every": 2, "keep_epochs": [2, 4],
    }  # fmt: skip
    assert pretrain.variables["nnUNet_ssl_config"] == str(pretrain.settings[0])
    assert pretrain.checkpoints != train.checkpoints
    assert set(plan.ids) == {f"{labeled} labelled, order {seed}" for labeled in (2, 4) for seed in (0, 1)}


def test_each_kind_of_training_is_timed_once(given, make_plan, write_times):
    given["rows"][1] |= {"settings": {}, "self_training": {"student": "nnUNetTrainerURPC", "rounds": 2}}
    given["rows"][3] |= {"pretrained_by": "nnUNetTrainerMAE"}
    given["budgets"] = [{"minutes": 4}]
    given["measure"] |= {"rounds": 1, "seconds": {"Labels only": 0.1}}
    plan = make_plan(given)
    names = [step.title.removeprefix("Time ").partition(", round")[0] for step in plan.measure()]
    assert names == ["CPS", "CPS, student", "CPS + SHTA", "More labels, pretraining"]
    seconds = {"CPS": 0.4, "CPS, student": 0.1, "CPS + SHTA": 0.5, "More labels, pretraining": 0.06}
    write_measurements(plan, write_times, seconds)
    means = {"labels_only": 0.1, "cps": 0.2, "cps_shta": 0.5, "more_labels": 0.08}
    assert plan.seconds_a_step() == pytest.approx(means)
    assert lengths(plan, 0) == {"Labels only": 600, "CPS": 100, "CPS + SHTA": 120, "More labels": 375}


def test_a_run_keeps_its_length_from_its_pretraining_on(given, make_plan, write_times):
    given["rows"] = [{"name": "Pretrained", "trainer": "nnUNetTrainerCPS", "pretrained_by": "nnUNetTrainerMAE"}]
    given["budgets"] = [{"minutes": 2}]
    plan = make_plan(given)
    write_measurements(plan, write_times, {"Pretrained": 0.1, "Pretrained, pretraining": 0.1})
    (run, *_) = plan.runs(plan.protocol.budgets[0], 2)
    pretrain = next(iter(plan.steps_of(run)))
    pretrain.settings[0].parent.mkdir(parents=True)
    pretrain.settings[0].write_text(json.dumps(pretrain.settings[1]))
    given["measure"]["seconds"] = {"Pretrained": 0.4}
    assert lengths(make_plan(given), 0)["Pretrained"] == run.iterations == 150


def test_comparison_of_all_rows_for_each_table_and_seed(given, make_plan):
    compared = [step for _, step in make_plan(given).compare()]
    assert len(compared) == 4
    words = compared[0].words
    names = [row["name"] for row in given["rows"]]
    assert list(words[words.index("--names") + 1 : words.index("-o")]) == names
    predictions = words[words.index("-pred") + 1 : words.index("--names")]
    assert [p.split("/runs/")[1] for p in predictions] == [
        "steps80/labels_only_2labeled_seed0/test_epoch4", "steps80/cps_2labeled_seed0/test_epoch4",
        "steps80/cps_shta_2labeled_seed0/test_epoch4", "steps80/more_labels_4labeled_seed0/test_epoch4",
    ]  # fmt: skip


def test_figures_of_the_named_rows(given, make_plan, tmp_path):
    assert list(make_plan(given).figures()) == []
    given |= {"figures": ["CPS", "Again"], "predict": ["--disable_tta"]}
    given["rows"].append({"name": "Again", "trainer": "nnUNetTrainerLabeledOnly", "self_training": {"rounds": 2}})
    given["budgets"][0]["steps"] = 120
    plan = make_plan(given)
    ((runs, step),) = plan.figures()
    runs_folder, again = tmp_path / "home" / "runs" / "steps120", plan.ids["steps120/again_2labeled_seed0"]
    assert [run.row.name for run in runs] == ["CPS", "Again"]
    assert list(step.words) == [
        "nnUNetv2_ssl_figures", "-d", "500", "-f", "0", "-m",
        f"{runs_folder}/cps_2labeled_seed0/results/Dataset500_*/nnUNetTrainerCPS_4epochs__nnUNetPlans__3d_fullres",
        f"{runs_folder}/again_2labeled_seed0/results/Dataset{again + 1}_*/"
        "nnUNetTrainerLabeledOnly_4epochs__nnUNetPlans__3d_fullres",
        "-pred", f"{runs_folder}/cps_2labeled_seed0/test_epoch4", f"{runs_folder}/again_2labeled_seed0/test_epoch4",
        "--names", "CPS", "Again", "-o", f"{tmp_path}/home/figures/steps120_2labeled_seed0", "--disable_tta",
    ]  # fmt: skip
    assert step.variables["OMP_NUM_THREADS"] == "1"


def test_a_shell_reads_the_words_as_they_are_meant(tmp_path):
    folder = tmp_path / "a b" / "Dataset501_Made"
    folder.mkdir(parents=True)
    pattern = str(tmp_path / "a b" / "Dataset501_*")
    words = [pattern, "it's", "*", "CPS + SHTA", "x_*"]
    line = "printf '%s\\n' " + " ".join(map(quoted, words))
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(folder), *words[1:]]
