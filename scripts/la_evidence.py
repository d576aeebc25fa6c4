"""The left atrium table of ``docs/results/la.md``: three trainers with 8 labelled cases of 80, the same time for each.

    python scripts/la_evidence.py prepare --dir runs/la --data DIR
    python scripts/la_evidence.py measure --dir runs/la
    python scripts/la_evidence.py run     --dir runs/la --minutes 12 --jobs 2
    python scripts/la_evidence.py report  --dir runs/la

Protocol: the 10 % set of the literature, 8 labelled and 72 unlabelled cases; 2.5 mm, patch 24 x 48 x 48, four stages of
8 to 64 features, batch 2 (+ 2 without labels); one seed. The 10 test cases are predicted and judged at their own
0.625 mm, without test-time mirroring. ``measure`` times each trainer on this plan (``benchmark_trainers.py``), and each
gets as many steps, in 40 epochs, as fit into ``--minutes`` of one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hippocampus_parts import command, environment, execute, raw_dataset

from nnunet_ssl.benchmark.report import fill
from nnunet_ssl.demo.plans import shrink_plans
from nnunet_ssl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PLANS = "nnUNetPlans_2.5mm"
CONFIGURATION = "3d_fullres"
DATASET_ID = 650
LABELED = 8
PATCH_SIZE = (24, 48, 48)
FEATURES = (8, 16, 32, 64)
EPOCHS = 40
TRAINERS = ("nnUNetTrainerLabeledOnly", "nnUNetTrainerSHTA_CPS", "nnUNetTrainerSASNet")


def prepare(home: Path, data: Path) -> None:
    """Make the dataset, plan it at 2.5 mm, shrink the plans, prepare the images."""
    for folder in ("raw", "preprocessed", "results"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    env, log = environment(home, nnUNet_n_proc_DA="1"), home / "prepare.log"
    if not list((home / "raw").glob(f"Dataset{DATASET_ID}_*")):
        script = [sys.executable, str(ROOT / "scripts" / "prepare_la.py"), "--data", str(data)]
        execute([*script, "--labeled", str(LABELED), "-d", str(DATASET_ID)], env, log)
    plan = ["-d", DATASET_ID, "-c", CONFIGURATION, "-npfp", 2, "-np", 2, "-overwrite_target_spacing", 2.5, 2.5, 2.5]
    execute(command("nnUNetv2_plan_and_preprocess", *plan, "-overwrite_plans_name", PLANS), env, log)
    plans = home / "preprocessed" / raw_dataset(home, DATASET_ID).name / f"{PLANS}.json"
    shrink_plans(plans, CONFIGURATION, FEATURES, patch_size=PATCH_SIZE, batch_size=2)
    execute(command("nnUNetv2_ssl_preprocess", "-d", DATASET_ID, "-c", CONFIGURATION, "-p", PLANS), env, log)


def measure(home: Path) -> None:
    """Seconds a step of each trainer."""
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_trainers.py"), "--trainers", *TRAINERS]
    plan = ["-d", raw_dataset(home, DATASET_ID).name, "-c", CONFIGURATION, "-p", PLANS, "--device", "cpu"]
    env = environment(home, nnUNet_n_proc_DA="0")
    options = ["--repeats", "4", "--steps", "4", "--output", str(home / "speed")]
    subprocess.run([*script, *plan, *options], env=env, check=True)


def seconds_a_step(benchmark: dict[str, Any]) -> dict[str, float]:
    """Seconds of making a batch and of a step, by trainer, with the default passes."""
    return {e["trainer"]: e["seconds_a_step"] for e in benchmark["trainers"] if e["passes"] != "joint"}


def train_and_test(home: Path, trainer: str, iterations: int) -> None:
    """Train one trainer, or go on with it; predict and evaluate the test cases."""
    folder = home / trainer
    folder.mkdir(exist_ok=True)
    settings = {"seed": 0, "num_iterations_per_epoch": iterations, "num_val_iterations_per_epoch": 1, "save_every": 10}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2))
    env = environment(
        home,
        nnUNet_ssl_config=str(folder / "settings.json"),
        nnUNet_def_n_proc="1",
        nnUNet_n_proc_DA="0",
        OMP_NUM_THREADS="1",
    )
    dataset, log, name = raw_dataset(home, DATASET_ID), folder / "commands.log", f"{trainer}_{EPOCHS}epochs"
    model = home / "results" / dataset.name / f"{name}__{PLANS}__{CONFIGURATION}"
    which = ["-p", PLANS, "-tr", name]
    if not (model / "fold_0" / "checkpoint_final.pth").exists():
        resume = ["--c"] if any(model.glob("fold_0/checkpoint_*.pth")) else []
        execute(command("nnUNetv2_train", DATASET_ID, CONFIGURATION, 0, *which, *resume, device="cpu"), env, log)
    out = folder / "test"
    places = ["-i", dataset / "imagesTs", "-o", out, "-d", DATASET_ID, "-c", CONFIGURATION, "-f", 0]
    options = ["--disable_tta", "-npp", 1, "-nps", 1]
    execute(command("nnUNetv2_predict", *places, *which, *options, device="cpu"), env, log)
    evaluate = ["-ref", dataset / "labelsTs", "-pred", out, "-djfile", dataset / "dataset.json", "-np", 1]
    execute(command("nnUNetv2_ssl_evaluate", *evaluate, "-o", folder / "evaluation"), env, log)


def run(home: Path, minutes: float, jobs: int) -> None:
    """Each trainer for the same time.

    Raises:
        UserError: the trainers have not been timed.
    """
    file = home / "speed.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; run `la_evidence.py measure` first.")
    seconds = seconds_a_step(json.loads(file.read_text()))
    iterations = {trainer: round(60 * minutes / EPOCHS / seconds[trainer]) for trainer in TRAINERS}
    (home / "iterations.json").write_text(json.dumps({"minutes": minutes, "iterations": iterations}))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda trainer: train_and_test(home, trainer, iterations[trainer]), TRAINERS))


def report(home: Path, page: Path) -> None:
    """Write the table into ``docs/results/la.md``."""
    budget = json.loads((home / "iterations.json").read_text())
    lines = ["| trained with | steps | Dice | Jaccard | HD95, mm | ASD, mm |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for trainer in TRAINERS:
        mean = json.loads((home / trainer / "evaluation" / "summary.json").read_text())["foreground_mean"]
        steps = budget["iterations"][trainer] * EPOCHS
        cells = [f"{mean[metric]:.3f}" for metric in ("Dice", "IoU")] + [f"{mean[m]:.2f}" for m in ("HD95", "ASD")]
        lines.append(f"| `{trainer}` | {steps:,} | " + " | ".join(cells) + " |")
    lines += ["", f"Each had {budget['minutes']:g} minutes of one CPU thread."]
    page.write_text(fill(page, "la", lines, "scripts/la_evidence.py report"), encoding="utf-8")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "run", "report"))
    parser.add_argument("--dir", type=Path, default=Path("runs/la"), help="where all of it is kept")
    parser.add_argument("--data", type=Path, help="prepare: folder with images/, labels/ and protocol.json")
    parser.add_argument("--minutes", type=float, default=12, help="run: of training, each trainer")
    parser.add_argument("--jobs", type=int, default=2, help="run: trainings at a time")
    args = parser.parse_args(argv)
    home = args.dir.resolve()
    if args.what == "prepare":
        if args.data is None:
            raise UserError("prepare needs --data, the folder with images/, labels/ and protocol.json.")
        prepare(home, args.data.resolve())
    elif args.what == "measure":
        measure(home)
    elif args.what == "run":
        run(home, args.minutes, args.jobs)
    else:
        report(home, ROOT / "docs" / "results" / "la.md")


if __name__ == "__main__":
    main()
