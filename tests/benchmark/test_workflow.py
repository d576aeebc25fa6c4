"""The commands of the Snakemake workflow, as its dry run prints them. ``test_benchmark.py`` runs them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nnunet_ssl.commands.benchmark import main

pytest.importorskip("snakemake", reason="Snakemake needs Python 3.11")

ONE_THREAD = "nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1 OMP_NUM_THREADS=1"


@pytest.fixture
def planned(tmp_path, write_protocol, monkeypatch, capfd):
    """``planned(given)``: what the dry run prints; with ``HOME`` and ``RAW`` for the folders."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))

    def run(given, *options, home=tmp_path / "home"):
        words = [write_protocol(given), "--dry-run", "-device", "cpu", "-np", 2, "-o", home, *options]
        capfd.readouterr()
        main([str(word) for word in words])
        text = "".join(capfd.readouterr())
        return text.replace(str(home), "HOME").replace(str(tmp_path / "raw"), "RAW")

    return run


@pytest.fixture
def commands(planned):
    """``commands(given)``: what makes each output, by the output's name; below ``HOME`` and ``RAW``."""

    def run(given, *options):
        text = planned(given, *options)
        found = re.findall(r"^    output: (.+?)$.+?^Shell command: (.+?)$", text, re.MULTILINE | re.DOTALL)
        return {output: re.sub(r" >> logs/\S+ 2>&1", "", command) for output, command in found}

    return run


def test_a_benchmark_of_a_dataset_that_is_split(given, commands, tmp_path):
    given |= {"planning": ["-overwrite_target_spacing", 2, 2, 2], "plans": "small", "figures": ["Labels only", "CPS"]}
    given |= {"shrink": {"features": [4, 6, 8], "patch_size": [8, 8, 8]}, "budgets": [{"steps": 80}]}
    given |= {"settings": {"num_val_iterations_per_epoch": 3}, "predict": ["--disable_tta"]}
    found = commands(given)
    assert not (tmp_path / "home").exists()  # nothing is done
    names = [row.split("/")[2] for row in found if row.endswith("/train")]
    assert sorted(names) == sorted(
        f"{row}_seed{seed}" for seed in (0, 1)
        for row in ("labels_only_2labeled", "cps_2labeled", "cps_shta_2labeled", "more_labels_4labeled")
    )  # fmt: skip
    assert found["done/dataset_501"] == (
        "mark=done/begun_501; test -e $mark && test -d RAW/Dataset501_* || { touch $mark && "
        "nnUNet_results=HOME/results nnUNetv2_ssl_split -d 1 -o 501 --labeled 2 --val 1 "
        f"--test {tmp_path / 'test.txt'} --seed 1 --name made_up_2_labeled_order_1 || {{ rm -f $mark; false; }}; }}"
    )
    assert found["done/plan_501"] == (
        "nnUNet_results=HOME/results nnUNet_n_proc_DA=1 nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres "
        "-overwrite_target_spacing 2 2 2 -overwrite_plans_name small -np 2 -npfp 2 && python -m nnunet_ssl.demo.plans "
        f"{tmp_path / 'preprocessed'}/Dataset501_*/small.json 3d_fullres --features 4 6 8 --patch-size 8 8 8 "
        "--batch-size 2"
    )
    assert found["done/prepare_501"] == (
        "nnUNet_results=HOME/results nnUNetv2_ssl_preprocess -d 501 -c 3d_fullres -p small -np 2"
    )
    assert found["done/prepare_502"] == "true"  # only rows without unlabeled images learn from four labels
    run = "HOME/runs/steps80/cps_2labeled_seed1"
    settings = {"seed": 1, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 3, "cps_weight": 0.5}
    settings |= {"save_every": 1, "keep_epochs": [2, 4]}
    variables = f"nnUNet_results={run}/results"
    assert found["done/steps80/cps_2labeled_seed1/train"] == (
        f"set -- --c; mkdir -p {run} && echo '{json.dumps(settings)}' > {run}/settings.json && {variables} "
        f"nnUNet_ssl_config={run}/settings.json {ONE_THREAD} python -P -m nnunet_ssl.stock_commands nnUNetv2_train 501 "
        '3d_fullres 0 -p small -tr nnUNetTrainerCPS_4epochs -device cpu "$@"'
    )
    assert found["done/steps80/cps_2labeled_seed1/predict_2"] == (
        f"{variables} {ONE_THREAD} python -P -m nnunet_ssl.stock_commands nnUNetv2_predict "
        f"-i RAW/Dataset501_*/imagesTs -o {run}/test_epoch2 -d 501 -c 3d_fullres -f 0 -p small "
        "-tr nnUNetTrainerCPS_4epochs -chk checkpoint_epoch2.pth --disable_tta -device cpu -npp 0 -nps 0"
    )
    evaluate = "nnUNetv2_ssl_evaluate -ref RAW/Dataset501_*/labelsTs -djfile RAW/Dataset501_*/dataset.json --metrics"
    summaries = "runs/steps80/cps_2labeled_seed1/evaluated_epoch{}/summary.json"
    assert found[summaries.format(2)] == f"{evaluate} dice -pred {run}/test_epoch2 -o {run}/evaluated_epoch2 -np 2"
    assert found[summaries.format(4)] == f"{evaluate} dice hd95 -pred {run}/test_epoch4 -o {run}/evaluated_epoch4 -np 2"

    words = shlex.split(found["compared/steps80_2labeled_seed1/comparison.json"])
    names = [row["name"] for row in given["rows"]]
    assert words[words.index("--names") + 1 : words.index("-o")] == names
    assert [p.split("/runs/")[1] for p in words[words.index("-pred") + 1 : words.index("--names")]] == [
        "steps80/labels_only_2labeled_seed1/test_epoch4", "steps80/cps_2labeled_seed1/test_epoch4",
        "steps80/cps_shta_2labeled_seed1/test_epoch4", "steps80/more_labels_4labeled_seed1/test_epoch4",
    ]  # fmt: skip
    model = "results/Dataset500_*/nnUNetTrainer{}_4epochs__small__3d_fullres"
    labels, cps = (f"HOME/runs/steps80/{row}_2labeled_seed0" for row in ("labels_only", "cps"))
    assert found["done/figures_steps80_2labeled"] == (
        f"nnUNet_results=HOME/results {ONE_THREAD} nnUNetv2_ssl_figures -d 500 -f 0 -m "
        f"{labels}/{model.format('LabeledOnly')} {cps}/{model.format('CPS')} -pred {labels}/test_epoch4 "
        f"{cps}/test_epoch4 --names 'Labels only' CPS -o HOME/figures/steps80_2labeled --disable_tta -device cpu -np 2"
    )


def test_several_trainings_and_measured_time(given, commands, tmp_path):
    again = {"rounds": 3, "student": "nnUNetTrainerURPC", "options": ["--keep", 0.5]}
    given["rows"] = [
        {"name": "Again", "trainer": "nnUNetTrainerWarps", "self_training": again},
        {"name": "Pretrained", "trainer": "nnUNetTrainerLabeledOnly", "pretrained_by": "nnUNetTrainerMAE"},
    ]
    given |= {"seeds": [0], "budgets": [{"steps": 80}, {"minutes": 5}], "curve": [1]}
    found = commands(given)
    run, result = "HOME/runs/steps80/again_2labeled_seed0", "done/steps80/again_2labeled_seed0"
    variables = f"nnUNet_results={run}/results nnUNet_ssl_config={run}/settings.json {ONE_THREAD}"
    assert found[f"{result}/self_train"] == (
        f"{variables} nnUNetv2_ssl_pseudolabel -d 500 -c 3d_fullres -f 0 -p nnUNetPlans -tr "
        "nnUNetTrainerWarps_4epochs -o 501 --rounds 3 --student nnUNetTrainerURPC_4epochs --keep 0.5 -device cpu -np 2"
    )
    assert "-d 503 " in found[f"{result}/predict_4"]
    assert "-tr nnUNetTrainerURPC_4epochs" in found[f"{result}/predict_4"]
    assert "RAW/Dataset500_*/imagesTs" in found[f"{result}/predict_4"]

    run = "HOME/runs/steps80/pretrained_2labeled_seed0"
    before, after = (found[f"done/steps80/pretrained_2labeled_seed0/{name}"] for name in ("pretrain", "train"))
    assert f"nnUNet_ssl_config={run}/pretraining.json" in before
    assert before.endswith("-tr nnUNetTrainerMAE_4epochs -device cpu --c")
    folds = [
        f"{run}/results/Dataset500_*/{trainer}_4epochs__nnUNetPlans__3d_fullres/fold_0"
        for trainer in ("nnUNetTrainerMAE", "nnUNetTrainerLabeledOnly")
    ]
    start = (
        f"if ls {folds[1]}/checkpoint_*.pth > /dev/null 2>&1; then set -- --c; "
        f"else set -- -pretrained_weights {folds[0]}/checkpoint_final.pth; fi; "
    )
    assert after.startswith(start)
    assert after.endswith(' -device cpu "$@"')
    home = tmp_path / "a folder"  # which the shell must not split
    weights, own = (Path(fold.replace("HOME", str(home)).replace("*", "Made")) for fold in folds)
    weights.mkdir(parents=True)
    own.mkdir(parents=True)
    (weights / "checkpoint_final.pth").touch()
    start = start.replace("HOME", f"'{home}'")
    for words in (["-pretrained_weights", str(weights / "checkpoint_final.pth")], ["--c"]):
        line = ["bash", "-euc", start + "printf '%s\\n' \"$@\""]
        assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines() == words
        (own / "checkpoint_latest.pth").touch()

    # how many steps five minutes are is known once each kind of training is timed
    measured = [name for name in found if name.startswith("done/measure/")]
    kinds = ("nnUNetTrainerWarps", "nnUNetTrainerURPC", "nnUNetTrainerMAE", "nnUNetTrainerLabeledOnly")
    assert sorted(measured) == sorted(f"done/measure/{kind}_{number}" for kind in kinds for number in (0, 1))
    assert (
        "-tr nnUNetTrainerURPC_3epochs -device cpu --c; } || echo 'failed, see logs/measure/"
        in found["done/measure/nnUNetTrainerURPC_1"]
    )
    assert not [name for name in found if "minutes5" in name]


def test_figures_wait_for_the_lengths_of_their_runs(given, commands):
    given |= {"budgets": [{"minutes": 5}], "figures": ["Labels only", "CPS"], "curve": [1]}
    found = commands(given)
    assert [name for name in found if name.startswith("done/measure/")]
    assert not [name for name, command in found.items() if "/train" in name or "null" in command]


def test_a_row_that_cannot_be_timed_keeps_none_back(given, commands, make_benchmark, write_times):
    """All were tried and CPS failed: the others have their lengths, and train."""
    given |= {"budgets": [{"minutes": 5}], "figures": ["Labels only", "CPS"], "curve": [1], "seeds": [0]}
    benchmark = make_benchmark(given)
    done = benchmark.home / "done"
    (done / "measure").mkdir(parents=True)
    for name in [f"{step}_{number}" for step in ("dataset", "plan", "prepare") for number in benchmark.sources()]:
        (done / name).touch()
    for name in benchmark.rounds():
        failed = name.startswith("nnUNetTrainerCPS_")
        (done / "measure" / name).write_text("failed, see its log" if failed else "")
        if not failed:
            write_times(benchmark.home / "measure" / name, [5.0, 1.0, 1.0])
    (done / "measured").touch()
    assert len(benchmark.failed_measurements()) == 2
    found = commands(given)
    trained = [name.split("/")[2] for name in found if name.endswith("/train")]
    assert sorted(trained) == ["cps_shta_2labeled_seed0", "labels_only_2labeled_seed0", "more_labels_4labeled_seed0"]
    (compare,) = (command for name, command in found.items() if name.startswith("compared/"))
    assert "--names 'Labels only' 'CPS + SHTA' 'More labels' -o" in compare
    assert "--names 'Labels only' -o" in found["done/figures_minutes5_2labeled"]


def test_published_data_and_what_snakemake_is_told(given, commands, tmp_path):
    given["data"] = {"published": "la", "options": ["--x", "{data}/x.txt"], "order_by_seed": True}
    given["rows"] = [given["rows"][0], {**given["rows"][3], "labeled": "all"}]
    given["budgets"] = [{"steps": 80}]
    data = tmp_path / "DATA"
    found = commands(given, "--data", data, "--until", "dataset")  # the last is one of Snakemake's own
    make = "nnUNet_results=HOME/results nnUNetv2_ssl_dataset la --labeled"
    end = f"--data {data} --x {data}/x.txt -np 2"
    assert {name: re.search(r"touch \$mark && (.+) \|\| ", command)[1] for name, command in found.items()} == {
        "done/dataset_500": f"{make} 2 -d 500 --seed 0 {end}",
        "done/dataset_501": f"{make} 2 -d 501 --seed 1 {end}",
        "done/dataset_502": f"{make} all -d 502 --seed 0 {end}",  # they have no order
    }


def threads_of(text):
    """Rule -> the cores that its jobs ask for."""
    found = re.findall(r"^(?:rule|checkpoint) (\w+):$(.+?)^Shell command", text, re.MULTILINE | re.DOTALL)
    return {name: int(m[1]) if (m := re.search(r"threads: (\d+)", job)) else 1 for name, job in found}


def test_what_is_timed_asks_a_cluster_for_the_cores_of_a_training(given, planned, monkeypatch):
    """On fewer, a step would wait for its batch, and budgets in time would have too few steps."""
    given["rows"][1]["pretrained_by"] = "nnUNetTrainerMAE"
    given |= {"seeds": [0], "budgets": [{"steps": 80}, {"minutes": 5}]}
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    found = threads_of(planned(given, "-device", "cuda", "--jobs", 4))
    assert {found[name] for name in ("measure", "pretrain", "train", "predict")} == {12}
    monkeypatch.setenv("nnUNet_n_proc_DA", "20")
    found = threads_of(planned(given, "-device", "cuda", "--jobs", 4, "--set-threads", "train=32"))
    assert [found[name] for name in ("measure", "train", "evaluate")] == [20, 32, 2]


def test_nothing_runs_beside_what_is_timed(given, planned):
    """Whatever could holds a part of the resource of which that takes all, also where a user limits another."""
    takes = {}
    for budgets in ([{"steps": 80}], [{"minutes": 5}]):  # at equal time, runs are planned once all are timed
        text = planned(given | {"budgets": budgets}, "--jobs", 3, "--resources", "mem_mb=1000")
        takes |= dict(re.findall(r"^rule (\w+):$[^\[]+?training=(\d+)", text, re.MULTILINE))
    assert takes["measure"] == "3"
    assert {takes[name] for name in ("train", "predict", "evaluate", "compare")} == {"1"}


def test_folders_with_signs_that_yaml_reads(given, planned, tmp_path):
    """Snakemake reads what it is told as YAML, in which `` #`` begins a comment."""
    given["data"], given["rows"] = {"published": "la"}, given["rows"][:1]
    given |= {"seeds": [0], "budgets": [{"steps": 80}]}
    odd = tmp_path / "a #b: c 'é'"
    text = planned(given, "--data", odd / "LA", "--page", odd / "page.md", home=odd / "out")
    made = re.search(r"nnUNetv2_ssl_dataset la .* -np 2", text)[0]
    words = shlex.split(made)
    assert words[words.index("--data") + 1] == str(odd / "LA")
    assert str(odd / "page.md") in shlex.split(re.search(r"nnUNetv2_ssl_benchmark .*--report .*", text)[0])
