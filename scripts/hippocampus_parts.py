"""Parts of SHTA and of SASNet one by one, on the hippocampus: the ablation tables of ``docs/results/parts.md``.

    python scripts/hippocampus_parts.py prepare --dir runs/parts --data DIR
    python scripts/hippocampus_parts.py run     --dir runs/parts --table shta_parts --seeds 0 --jobs 2
    python scripts/hippocampus_parts.py run     --dir runs/parts --table sasnet_parts --jobs 2
    python scripts/hippocampus_parts.py report  --dir runs/parts --table sasnet_parts

Datasets, plans, steps and seeds are those of the protocol that ``nnUNetv2_ssl_benchmark hippocampus`` runs: 2 mm, patch
20 x 28 x 20, three stages of 8, 16 and 32 features, batch 2 (+ 2 without labels), 5 labelled cases, one order of the
cases a seed, 40 test cases, no test-time mirroring, 40 epochs of 64 steps. The last checkpoint predicts; nothing is
chosen by test or validation.

A run on the CPU has one thread, as in the benchmark, and makes its batches itself. It can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.report import fill
from nnunet_ssl.demo.plans import shrink_plans
from nnunet_ssl.errors import UserError
from nnunet_ssl.stock_commands import of_this_python

ROOT = Path(__file__).resolve().parent.parent
PLANS = "nnUNetPlans_2mm"
CONFIGURATION = "3d_fullres"
EPOCHS = 40
PATCH_SIZE = (20, 28, 20)  # nnU-Net's own for two of the three orders, so the same for all
FEATURES = (8, 16, 32)
LABELED = 5
FIRST_ID = 640  # one dataset an order
CLASSES = {"1": "anterior", "2": "posterior"}
DISTANCES = ("HD95", "ASD")
WRITER = "scripts/hippocampus_parts.py report"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        key: in file names and in the results file.
        title: in the table.
        trainer: nnU-Net trainer class.
        settings: of the method, beside those that all runs share.
    """

    key: str
    title: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def without(part: str, **settings: Any) -> Row:
    """SASNet without one of its parts."""
    key = f"sasnet_without_{part.replace(' ', '_').replace('-', '_').lower()}"
    return Row(key, f"... without {part}", "nnUNetTrainerSASNet", settings=settings)


def part_of_shta(part: str, *others: str) -> Row:
    """Table III of the SHTA paper: one part alone, on GA-CPS."""
    off = {f"shta_{other}_weight": 0 for other in others}
    return Row(f"shta_gacps_{part}_only", f"... with {part} alone", "nnUNetTrainerSHTA_GACPS", settings=off)


TABLES = {
    "shta_parts": (
        Row("gacps", "`nnUNetTrainerGACPS`", "nnUNetTrainerGACPS"),
        Row("shta_gacps", "`nnUNetTrainerSHTA_GACPS`", "nnUNetTrainerSHTA_GACPS"),
        part_of_shta("assign", "hard", "center"),
        part_of_shta("hard", "assign", "anchor", "center"),
        part_of_shta("center", "assign", "anchor", "hard"),
    ),
    "sasnet_parts": (
        Row("sasnet", "`nnUNetTrainerSASNet`", "nnUNetTrainerSASNet"),
        without("SAR", sasnet_sar="off"),
        without("SDM", sasnet_sdm=False),
        without("low-level branch", sasnet_low_level_start=0),
        without("view variance", sasnet_views="off"),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: a row and a seed, with its folders below ``home``."""

    home: Path
    row: Row
    seed: int
    steps: int
    device: str

    @property
    def dataset_id(self) -> int:
        """nnU-Net's number of the dataset."""
        return FIRST_ID + self.seed

    @property
    def iterations(self) -> int:
        """Steps of an epoch."""
        return self.steps // EPOCHS

    @property
    def folder(self) -> Path:
        """Settings, logs, results and predictions of this run."""
        return self.home / f"steps{self.steps}" / self.row.key / f"seed{self.seed}"

    @property
    def trainer(self) -> str:
        """Trainer class with its epochs."""
        return f"{self.row.trainer}_{EPOCHS}epochs"

    @property
    def dataset(self) -> Path:
        """The raw dataset."""
        return raw_dataset(self.home, self.dataset_id)

    @property
    def model(self) -> Path:
        """nnU-Net's folder of the trained fold."""
        name = f"{self.trainer}__{PLANS}__{CONFIGURATION}"
        return self.folder / "results" / self.dataset.name / name / "fold_0"

    @property
    def summary(self) -> Path:
        """The evaluation of the test cases."""
        return self.folder / f"test_epoch{EPOCHS}" / "summary.json"


def raw_dataset(home: Path, dataset_id: int) -> Path:
    """The raw dataset of an id, which ``prepare`` has made."""
    found = sorted((home / "raw").glob(f"Dataset{dataset_id:03d}_*"))
    if not found:
        raise UserError(f"{home / 'raw'} has no dataset {dataset_id}; run `hippocampus_parts.py prepare` first.")
    return found[0]


def environment(home: Path, **more: str) -> dict[str, str]:
    """nnU-Net's folders below ``home``, and the checkout on Python's path."""
    return {
        **os.environ,
        "nnUNet_raw": str(home / "raw"),
        "nnUNet_preprocessed": str(home / "preprocessed"),
        "nnUNet_results": str(home / "results"),
        "nnUNet_extTrainer": str(ROOT / "nnunet_ssl" / "_ext"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "MPLBACKEND": "Agg",
        **more,
    }


def command(name: str, *args: Any, device: str | None = None) -> list[str]:
    """A command of nnU-Net's or ours; on the CPU one that trains or predicts is held to one thread."""
    options = [] if device is None else ["-device", device]
    return of_this_python([name, *map(str, args), *options], device or "")


def execute(words: list[str], env: dict[str, str], log: Path) -> None:
    """Run a command, its output at the end of ``log``.

    Raises:
        RuntimeError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n$ {shlex.join(words)}\n")
        stream.flush()
        code = subprocess.run(words, env=env, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise RuntimeError(f"ended with exit code {code}, see {log}")


# ---------------------------------------------------------------------------------------------------------- prepare


def prepare(home: Path, data: Path, seeds: list[int]) -> None:
    """Make the datasets, plan at 2 mm, shrink the plans, prepare labelled and unlabelled images."""
    for folder in ("raw", "preprocessed", "results"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    # planning hands nnUNet_n_proc_DA to torch as a number of threads, so it must not be 0
    env, log = environment(home, nnUNet_n_proc_DA="1"), home / "prepare.log"
    for seed in seeds:
        dataset_id = FIRST_ID + seed
        done = home / f"prepared_{dataset_id}"
        if done.exists():
            continue
        print(f"Dataset {dataset_id} ...", flush=True)
        if not list((home / "raw").glob(f"Dataset{dataset_id:03d}_*")):
            script = [sys.executable, str(ROOT / "scripts" / "prepare_hippocampus.py")]
            options = ["--data", str(data), "--seed", str(seed), "--labeled", str(LABELED), "-d", str(dataset_id)]
            execute(script + options, env, log)
        plan = ["-d", dataset_id, "-c", CONFIGURATION, "-npfp", 2, "-np", 2, "-overwrite_target_spacing", 2, 2, 2]
        execute(command("nnUNetv2_plan_and_preprocess", *plan, "-overwrite_plans_name", PLANS), env, log)
        plans = home / "preprocessed" / raw_dataset(home, dataset_id).name / f"{PLANS}.json"
        shrink_plans(plans, CONFIGURATION, FEATURES, patch_size=PATCH_SIZE, batch_size=2)
        execute(command("nnUNetv2_ssl_preprocess", "-d", dataset_id, "-c", CONFIGURATION, "-p", PLANS), env, log)
        done.touch()


# -------------------------------------------------------------------------------------------------------------- run


def plan_runs(home: Path, steps: int, seeds: list[int], table: str, device: str) -> list[Run]:
    """The queue.

    Raises:
        UserError: the steps do not fill the epochs.
    """
    if steps % EPOCHS:
        raise UserError(f"--steps {steps}: a run has {EPOCHS} epochs, so take a multiple of {EPOCHS}.")
    return [Run(home, row, seed, steps, device) for seed in seeds for row in TABLES[table]]


def train_and_test(run: Run) -> None:
    """Train one run, or go on with it, and predict and evaluate the test cases."""
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": run.seed,
        "num_iterations_per_epoch": run.iterations,
        "num_val_iterations_per_epoch": 1,  # nothing is chosen by it
        "save_every": 10,
        "keep_epochs": [10, 20, 40],
        **run.row.settings,
    }
    (run.folder / "settings.json").write_text(json.dumps(settings, indent=2))
    env = environment(
        run.home,
        nnUNet_results=str(run.folder / "results"),
        nnUNet_ssl_config=str(run.folder / "settings.json"),
        nnUNet_def_n_proc="1",
        **({"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"} if run.device == "cpu" else {}),
    )
    log = run.folder / "commands.log"
    which = ["-p", PLANS, "-tr", run.trainer]
    if not (run.model / "validation" / "summary.json").exists():
        resume = ["--c"] if any(run.model.glob("checkpoint_*.pth")) else []
        train = command("nnUNetv2_train", run.dataset_id, CONFIGURATION, 0, *which, *resume, device=run.device)
        execute(train, env, log)
    if run.summary.exists():
        return
    out, dataset = run.summary.parent, run.dataset
    places = ["-i", dataset / "imagesTs", "-o", out, "-d", run.dataset_id, "-c", CONFIGURATION, "-f", 0]
    # without workers: so few small cases take less time than it takes to start them
    options = ["-chk", f"checkpoint_epoch{EPOCHS}.pth", "--disable_tta", "-npp", 0, "-nps", 0]
    execute(command("nnUNetv2_predict", *places, *which, *options, device=run.device), env, log)
    files = ["-ref", dataset / "labelsTs", "-pred", out, "-djfile", dataset / "dataset.json", "-o", out, "-np", 1]
    execute(command("nnUNetv2_ssl_evaluate", *files), env, log)


def run_queue(runs: list[Run], jobs: int) -> None:
    """Work through the queue, ``jobs`` at a time; what is done is skipped, what fails does not stop the rest.

    Raises:
        UserError: some runs failed.
    """

    def work(run: Run) -> str | None:
        name, start = f"{run.row.key}, seed {run.seed}", time.time()
        try:
            train_and_test(run)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            return name
        minutes, dice = (time.time() - start) / 60, tested(run)["mean"]
        print(f"{name}: done after {minutes:.1f} min, test Dice {dice:.4f}", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [name for name in pool.map(work, runs) if name is not None]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. Mend and start again.")


# ----------------------------------------------------------------------------------------------------------- report


def tested(run: Run) -> dict[str, float]:
    """Mean test Dice of each class and of both, and mean surface distances of both in mm."""
    summary = json.loads(run.summary.read_text())
    dice = {CLASSES[label]: metrics["Dice"] for label, metrics in summary["mean"].items()}
    distances = {key: summary["foreground_mean"][key] for key in DISTANCES}
    return {**dice, "mean": summary["foreground_mean"]["Dice"], **distances}


def collect(runs: list[Run]) -> dict[str, Any]:
    """Everything the report needs, of the runs that are finished."""
    finished = [run for run in runs if run.summary.exists()]
    if not finished:
        raise UserError("no run is finished yet; `hippocampus_parts.py run` makes them.")
    return {
        "steps": finished[0].steps,
        "versions": {name: version(name) for name in ("nnunetv2", "torch", "batchgeneratorsv2")},
        "runs": [{"row": run.row.key, "seed": run.seed, **tested(run)} for run in finished],
    }


def table(results: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """The lines of the table, as Markdown."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    each_seed = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
    yield "| " + " | ".join(["trained with", *CLASSES.values(), *each_seed, "mean Dice", "HD95, mm", "ASD, mm"]) + " |"
    yield "| --- |" + " ---: |" * (len(CLASSES) + len(each_seed) + 3)
    for row in rows:
        own = {run["seed"]: run for run in results["runs"] if run["row"] == row.key}
        if not own:
            continue
        keys = (*CLASSES.values(), "mean", *DISTANCES)
        means = {key: statistics.mean(run[key] for run in own.values()) for key in keys}
        cells = [row.title, *(f"{means[name]:.3f}" for name in CLASSES.values())]
        cells += [f"{own[seed]['mean']:.3f}" if seed in own else "" for seed in seeds if each_seed]
        cells += [f"**{means['mean']:.3f}**", *(f"{means[key]:.2f}" for key in DISTANCES)]
        yield "| " + " | ".join(cells) + " |"


def report(results: dict[str, Any], docs: Path, name: str) -> None:
    """Write the results file, and the table into ``docs/results/parts.md`` between its marks.

    Args:
        results: of :func:`collect`.
        docs: folder of the documentation.
        name: of ``TABLES``; also of the marks and the results file.

    Raises:
        UserError: the page has no marks.
    """
    page = docs / "results" / "parts.md"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [*table(results, TABLES[name]), "", f"{results['steps']:,} steps. Versions: {versions}."]
    page.write_text(fill(page, name, lines, WRITER), encoding="utf-8")
    (page.parent / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "report"))
    parser.add_argument("--dir", type=Path, default=Path("runs/parts"), help="where all of it is kept")
    parser.add_argument("--data", type=Path, help="prepare: folder of the published data")
    parser.add_argument("--steps", type=int, default=2560, help="steps of a run, a multiple of 40")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the protocol's orders")
    parser.add_argument("--table", default="shta_parts", choices=list(TABLES))
    parser.add_argument("--jobs", type=int, default=2, help="run: trainings at a time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    home = args.dir.resolve()

    if args.what == "prepare":
        if args.data is None:
            raise UserError("prepare needs --data, the folder of the published data.")
        try:
            prepare(home, args.data.resolve(), args.seeds)
        except RuntimeError as error:
            raise UserError(f"preparing {error}") from None
        return
    runs = plan_runs(home, args.steps, args.seeds, args.table, args.device)
    if args.what == "run":
        run_queue(runs, args.jobs)
    else:
        report(collect(runs), ROOT / "docs", args.table)


if __name__ == "__main__":
    main()
