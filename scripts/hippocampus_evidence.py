"""The hippocampus tables of ``docs/results.md``: a queue of nnU-Net's own commands that can be stopped and restarted.

    python scripts/hippocampus_evidence.py prepare --dir runs/hippocampus --data DIR
    python scripts/hippocampus_evidence.py measure --dir runs/hippocampus
    python scripts/hippocampus_evidence.py run     --dir runs/hippocampus --steps 10000 --seeds 0 1 2 --jobs 2
    python scripts/hippocampus_evidence.py report  --dir runs/hippocampus

``--table hosts`` (with ``run`` and ``report``) is SHTA on each of its hosts, and its parts on GA-CPS.

Protocol: 2 mm, patch 20 x 28 x 20, three stages of 8, 16 and 32 features, batch 2 (+ 2 without labels), 5 labelled
cases, one order of the cases a seed, 40 test cases, no test-time mirroring. A run has 40 epochs of ``steps / 40``
steps. Test Dice is taken after 10, 20 and 40 epochs; nothing is chosen by it, nor by validation.

``measure`` times the trainers on this plan, one after the other and back (``benchmark_trainers.py``). From that comes
how many more steps the labelled-only trainer gets in the row with equal wall-clock.

A run on the CPU has one thread: ``nnUNetv2_train -device cpu`` asks torch for as many threads as there are cores, so
two at a time would fight. The commands are therefore called through Python with ``multiprocessing.cpu_count`` saying
1; everything else is nnU-Net's entry point. Augmentation runs in the same thread (``nnUNet_n_proc_DA=0``).
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import benchmark_trainers

from nnunet_ssl.benchmark.report import fill
from nnunet_ssl.benchmark.run import of_this_python
from nnunet_ssl.commands.evaluate import main as evaluate
from nnunet_ssl.demo.plans import shrink_plans
from nnunet_ssl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PLANS = "nnUNetPlans_2mm"
CONFIGURATION = "3d_fullres"
EPOCHS = 40
CURVE = (10, 20, 40)  # epochs after which the test cases are predicted
PATCH_SIZE = (20, 28, 20)  # nnU-Net's own for two of the three orders, so the same for all
FEATURES = (8, 16, 32)
LABELED = 5
FIRST_ID = 640  # one dataset an order, and 649 with all labels
ALL_LABELS_ID = 649
CLASSES = {"1": "anterior", "2": "posterior"}
DISTANCES = ("HD95", "ASD")
DEAREST = "nnUNetTrainerSHTA_CPS"  # of the equal time; GA-CPS takes the same, MagicNet a fifth more
WRITER = "scripts/hippocampus_evidence.py report"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        key: in file names and in the results file.
        title: in the table.
        trainer: nnU-Net trainer class.
        all_labels: whether all 160 training cases keep their labels.
        equal_time: whether it gets as many steps as the time of ``DEAREST`` allows.
        settings: of the method, beside those that all runs share.
    """

    key: str
    title: str
    trainer: str
    all_labels: bool = False
    equal_time: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def without(part: str, **settings: Any) -> Row:
    """SASNet without one of its parts."""
    key = f"sasnet_without_{part.replace(' ', '_').replace('-', '_').lower()}"
    return Row(key, f"... without {part}", "nnUNetTrainerSASNet", settings=settings)


def host(name: str) -> tuple[Row, Row]:
    """A host of SHTA, by itself and with SHTA."""
    return tuple(Row(t.lower(), f"`nnUNetTrainer{t}`", f"nnUNetTrainer{t}") for t in (name, f"SHTA_{name}"))


def as_long(name: str, key: str | None = None) -> Row:
    """A trainer for as long as ``DEAREST`` takes."""
    title = f"`nnUNetTrainer{name}`, as long as `{DEAREST}`"
    return Row(key or f"{name.lower()}_equal_time", title, f"nnUNetTrainer{name}", equal_time=True)


def part_of_shta(part: str, *others: str) -> Row:
    """Table III of the SHTA paper: one part alone, on GA-CPS."""
    off = {f"shta_{other}_weight": 0 for other in others}
    return Row(f"shta_gacps_{part}_only", f"... with {part} alone", "nnUNetTrainerSHTA_GACPS", settings=off)


ROWS = (
    Row("labeled_only", "`nnUNetTrainerLabeledOnly`, 5 labels", "nnUNetTrainerLabeledOnly"),
    Row("shta_labeledonly", "`nnUNetTrainerSHTA_LabeledOnly`, 5 labels", "nnUNetTrainerSHTA_LabeledOnly"),
    Row("cps", "`nnUNetTrainerCPS`, 5 labels + 155 without", "nnUNetTrainerCPS"),
    Row("shta_cps", "`nnUNetTrainerSHTA_CPS`, 5 labels + 155 without", "nnUNetTrainerSHTA_CPS"),
    Row("sasnet", "`nnUNetTrainerSASNet`, 5 labels + 155 without", "nnUNetTrainerSASNet"),
    without("SAR", sasnet_sar="off"),
    without("SDM", sasnet_sdm=False),
    without("low-level branch", sasnet_low_level_start=0),
    without("view variance", sasnet_views="off"),
    Row("all_labels", "`nnUNetTrainerLabeledOnly`, all 160 labels", "nnUNetTrainerLabeledOnly", all_labels=True),
    as_long("LabeledOnly", "labeled_only_equal_time"),
    as_long("SHTA_LabeledOnly"),
    as_long("URPC"),
    as_long("SHTA_URPC"),
    *host("GACPS"),
    part_of_shta("assign", "hard", "center"),
    part_of_shta("hard", "assign", "anchor", "center"),
    part_of_shta("center", "assign", "anchor", "hard"),
    *host("URPC"),
    *host("MagicNet"),
)  # fmt: skip
TABLES = {
    "hippocampus": "labeled_only cps shta_cps sasnet sasnet_without_sar sasnet_without_sdm "
    "sasnet_without_low_level_branch sasnet_without_view_variance all_labels labeled_only_equal_time".split(),
    "hosts": "labeled_only shta_labeledonly cps shta_cps gacps shta_gacps shta_gacps_assign_only "
    "shta_gacps_hard_only shta_gacps_center_only urpc shta_urpc magicnet shta_magicnet labeled_only_equal_time "
    "shta_labeledonly_equal_time urpc_equal_time shta_urpc_equal_time".split(),
}
PAIRS = (
    ("labeled_only", "shta_labeledonly"),
    *((name, f"shta_{name}") for name in ("cps", "gacps", "urpc", "magicnet")),
    ("labeled_only_equal_time", "shta_labeledonly_equal_time"),
    ("urpc_equal_time", "shta_urpc_equal_time"),
)


@dataclass(frozen=True)
class Run:
    """One training: a row and a seed, with its folders below ``home``."""

    home: Path
    row: Row
    seed: int
    steps: int
    epochs: int
    device: str

    @property
    def dataset_id(self) -> int:
        """nnU-Net's number of the dataset."""
        return ALL_LABELS_ID if self.row.all_labels else FIRST_ID + self.seed

    @property
    def iterations(self) -> int:
        """Steps of an epoch; the same for every row, so a longer run has more epochs."""
        return self.steps // EPOCHS

    @property
    def curve(self) -> tuple[int, ...]:
        """Epochs after which the test cases are predicted."""
        return tuple(round(epoch * self.epochs / EPOCHS) for epoch in CURVE)

    @property
    def folder(self) -> Path:
        """Settings, logs, results and predictions of this run."""
        return self.home / f"steps{self.steps}" / self.row.key / f"seed{self.seed}"

    @property
    def trainer(self) -> str:
        """Trainer class with its epochs."""
        return f"{self.row.trainer}_{self.epochs}epochs"

    @property
    def dataset(self) -> Path:
        """The raw dataset."""
        return raw_dataset(self.home, self.dataset_id)

    @property
    def model(self) -> Path:
        """nnU-Net's folder of the trained fold."""
        name = f"{self.trainer}__{PLANS}__{CONFIGURATION}"
        return self.folder / "results" / self.dataset.name / name / "fold_0"

    def summary(self, epoch: int) -> Path:
        """nnU-Net's evaluation of the test cases after an epoch."""
        return self.folder / f"test_epoch{epoch}" / "summary.json"


def raw_dataset(home: Path, dataset_id: int) -> Path:
    """The raw dataset of an id, which ``prepare`` has made."""
    found = sorted((home / "raw").glob(f"Dataset{dataset_id:03d}_*"))
    if not found:
        raise UserError(f"{home / 'raw'} has no dataset {dataset_id}; run `hippocampus_evidence.py prepare` first.")
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
    with log.open("a") as stream:
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
    wanted = [(FIRST_ID + seed, seed, str(LABELED)) for seed in seeds] + [(ALL_LABELS_ID, 0, "all")]
    for dataset_id, seed, labeled in wanted:
        done = home / f"prepared_{dataset_id}"
        if done.exists():
            continue
        print(f"Dataset {dataset_id} ...", flush=True)
        if not list((home / "raw").glob(f"Dataset{dataset_id:03d}_*")):
            script = [sys.executable, str(ROOT / "scripts" / "prepare_hippocampus.py")]
            options = ["--data", str(data), "--seed", str(seed), "--labeled", labeled, "-d", str(dataset_id)]
            execute(script + options, env, log)
        plan = ["-d", dataset_id, "-c", CONFIGURATION, "-npfp", 2, "-np", 2, "-overwrite_target_spacing", 2, 2, 2]
        execute(command("nnUNetv2_plan_and_preprocess", *plan, "-overwrite_plans_name", PLANS), env, log)
        plans = home / "preprocessed" / raw_dataset(home, dataset_id).name / f"{PLANS}.json"
        shrink_plans(plans, CONFIGURATION, FEATURES, patch_size=PATCH_SIZE, batch_size=2)
        if labeled != "all":
            execute(command("nnUNetv2_ssl_preprocess", "-d", dataset_id, "-c", CONFIGURATION, "-p", PLANS), env, log)
        done.touch()


def measure(home: Path, device: str) -> None:
    """Time the trainers on this plan, for the row with equal wall-clock."""
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_trainers.py")]
    plan = ["-d", raw_dataset(home, FIRST_ID).name, "-c", CONFIGURATION, "-p", PLANS]
    options = ["--device", device, "--threads", "1", "--output", str(home / "speed")]
    subprocess.run(script + plan + options, env=environment(home, nnUNet_n_proc_DA="0"), check=True)


def time_factor(home: Path, trainer: str) -> float:
    """How many steps of a trainer take the time of one step of ``DEAREST``.

    Raises:
        UserError: ``measure`` has not been run.
    """
    file = home / "speed.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; run `hippocampus_evidence.py measure` first, or leave the row out.")
    seconds = seconds_a_step(json.loads(file.read_text()))
    return seconds[DEAREST] / seconds[trainer]


def seconds_a_step(benchmark: dict[str, Any]) -> dict[str, float]:
    """Seconds of making a batch and of a step, by trainer, with the default passes."""
    return {e["trainer"]: e["seconds_a_step"] for e in benchmark["trainers"] if e["passes"] != "joint"}


# -------------------------------------------------------------------------------------------------------------- run


def plan_runs(home: Path, steps: int, seeds: list[int], rows: list[str], device: str) -> list[Run]:
    """The queue, the row that needs the measured times last."""
    if steps % EPOCHS:
        raise UserError(f"--steps {steps}: a run has {EPOCHS} epochs, so take a multiple of {EPOCHS}.")
    runs = []
    for seed in seeds:
        for row in ROWS:
            if row.key in rows:
                run = Run(home, row, seed, steps, EPOCHS, device)
                runs.append(replace(run, epochs=equal_time_epochs(run)) if row.equal_time else run)
    return sorted(runs, key=lambda run: run.row.equal_time)


def equal_time_epochs(run: Run) -> int:
    """The epochs of a run that was started, which a later measurement does not change, or those of the times."""
    for model in run.folder.glob(f"results/*/{run.row.trainer}_*epochs__{PLANS}__{CONFIGURATION}"):
        return int(model.name.removeprefix(f"{run.row.trainer}_").split("epochs__")[0])
    return round(EPOCHS * time_factor(run.home, run.row.trainer))


def train_and_test(run: Run) -> None:
    """Train one run, or go on with it, and predict and evaluate the test cases at each point of the curve."""
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": run.seed,
        "num_iterations_per_epoch": run.iterations,
        "num_val_iterations_per_epoch": 1,  # nothing is chosen by it
        "save_every": CURVE[0],
        "keep_epochs": run.curve,
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
    for epoch in run.curve:
        if run.summary(epoch).exists():
            continue
        out = run.summary(epoch).parent
        places = ["-i", run.dataset / "imagesTs", "-o", out, "-d", run.dataset_id, "-c", CONFIGURATION, "-f", 0]
        # without workers: so few small cases take less time than it takes to start them
        options = ["-chk", f"checkpoint_epoch{epoch}.pth", "--disable_tta", "-npp", 0, "-nps", 0]
        execute(command("nnUNetv2_predict", *places, *which, *options, device=run.device), env, log)
        execute(command("nnUNetv2_ssl_evaluate", *evaluation_of(run, epoch)), env, log)


def evaluation_of(run: Run, epoch: int) -> list[str]:
    """Arguments of ``nnUNetv2_ssl_evaluate``, which writes its summary where the predictions are."""
    out = run.summary(epoch).parent
    files = ["-ref", run.dataset / "labelsTs", "-pred", out, "-djfile", run.dataset / "dataset.json", "-o", out]
    return [*map(str, files), "-np", "1"]


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
        minutes, dice = (time.time() - start) / 60, dice_after(run, run.epochs)["mean"]
        print(f"{name}: done after {minutes:.1f} min, test Dice {dice:.4f}", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [name for name in pool.map(work, runs) if name is not None]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. Mend and start again.")


# ----------------------------------------------------------------------------------------------------------- report


def dice_after(run: Run, epoch: int) -> dict[str, float]:
    """Mean test Dice of each class and of both after an epoch, and mean surface distances of both in mm."""
    summary = json.loads(run.summary(epoch).read_text())
    dice = {CLASSES[label]: metrics["Dice"] for label, metrics in summary["mean"].items()}
    distances = {key: summary["foreground_mean"][key] for key in DISTANCES if key in summary["foreground_mean"]}
    return {**dice, "mean": summary["foreground_mean"]["Dice"], **distances}


def collect(runs: list[Run]) -> dict[str, Any]:
    """Everything the report needs, of the runs that are finished."""
    finished = [run for run in runs if run.summary(run.epochs).exists()]
    if not finished:
        raise UserError("no run is finished yet; `hippocampus_evidence.py run` makes them.")
    home = finished[0].home
    speed = json.loads((home / "speed.json").read_text()) if (home / "speed.json").is_file() else None
    return {
        "steps": finished[0].steps,
        "benchmark": speed,
        "versions": {name: version(name) for name in ("nnunetv2", "torch", "batchgeneratorsv2")},
        "runs": [
            {
                "row": run.row.key,
                "seed": run.seed,
                "steps": run.epochs * run.iterations,
                "curve": [
                    {"steps": epoch * run.iterations, **dice_after(run, epoch)}
                    for epoch in run.curve
                    if run.summary(epoch).exists()
                ],
            }
            for run in finished
        ],
    }  # fmt: skip


def table(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, as Markdown."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    seed_titles = " | ".join(f"seed {s}" for s in seeds)
    yield f"| trained on | steps | anterior | posterior | {seed_titles} | mean Dice | HD95, mm | ASD, mm |"
    yield "| --- | ---: |" + " ---: |" * (len(seeds) + 5)
    for row in ROWS:
        runs = {run["seed"]: run for run in results["runs"] if run["row"] == row.key}
        if not runs:
            continue
        last = {seed: run["curve"][-1] for seed, run in runs.items()}
        classes = [statistics.mean(dice[name] for dice in last.values()) for name in CLASSES.values()]
        each = [f"{last[seed]['mean']:.3f}" if seed in last else "" for seed in seeds]
        mean = statistics.mean(dice["mean"] for dice in last.values())
        steps = next(iter(runs.values()))["steps"]
        cells = [row.title, f"{steps:,}", *(f"{dice:.3f}" for dice in classes), *each, f"**{mean:.3f}**"]
        for key in DISTANCES:
            known = [dice[key] for dice in last.values() if key in dice]
            cells.append(f"{statistics.mean(known):.2f}" if len(known) == len(last) else "")
        yield "| " + " | ".join(cells) + " |"


def curve_table(results: dict[str, Any]) -> Iterator[str]:
    """The mean over seeds at each point of the learning curve, as Markdown."""
    points = [point["steps"] for point in next(r for r in results["runs"] if r["row"] == "labeled_only")["curve"]]
    yield "| after steps | " + " | ".join(f"{steps:,}" for steps in points) + " |"
    yield "| --- |" + " ---: |" * len(points)
    for row in ROWS:
        curves = [run["curve"] for run in results["runs"] if run["row"] == row.key and not row.equal_time]
        if curves:
            at = [[point["mean"] for curve in curves for point in curve if point["steps"] == steps] for steps in points]
            cells = [f"{statistics.mean(dice):.3f}" if len(dice) == len(curves) else "" for dice in at]
            yield f"| {row.title} | " + " | ".join(cells) + " |"


def pairs_table(results: dict[str, Any]) -> Iterator[str]:
    """What SHTA changes of each host, seed by seed, as Markdown."""
    final = {(run["row"], run["seed"]): run["curve"][-1] for run in results["runs"]}
    seeds = sorted({seed for _, seed in final})
    yield "| SHTA on | anterior | posterior | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |"
    yield "| --- |" + " ---: |" * (len(seeds) + 3)
    for alone, with_shta in PAIRS:
        both = [seed for seed in seeds if (alone, seed) in final and (with_shta, seed) in final]
        if not both:
            continue

        def gain(seed: int, name: str, pair: tuple[str, str] = (alone, with_shta)) -> float:
            before, after = (final[row, seed][name] for row in pair)
            return after - before

        cells = [f"{statistics.mean(gain(s, name) for s in both):+.3f}" for name in CLASSES.values()]
        cells += [f"{gain(s, 'mean'):+.3f}" if s in both else "" for s in seeds]
        row = next(row for row in ROWS if row.key == alone)
        title = f"`{row.trainer}`" + (f", as long as `{DEAREST}`" if row.equal_time else "")
        yield f"| {title} | " + " | ".join(cells) + f" | **{statistics.mean(gain(s, 'mean') for s in both):+.3f}** |"


def draw_curves(results: dict[str, Any], file: Path) -> None:
    """Test Dice over steps and over training time: a thin line a seed, a thick one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = seconds_a_step(results["benchmark"]) if results["benchmark"] else None
    width, size = (2, (11, 4.2)) if seconds else (1, (6, 4.2))
    figure, panels = plt.subplots(1, width, figsize=size, sharey=True, squeeze=False)
    drawn = [row for row in ROWS if row.key in {run["row"] for run in results["runs"]}]
    for panel, unit in zip(panels[0], ("steps", "minutes"), strict=False):
        for colour, row in zip(plt.get_cmap("tab20").colors, drawn, strict=False):
            curves = [run["curve"] for run in results["runs"] if run["row"] == row.key]
            if row.equal_time if unit == "steps" else row.trainer not in seconds:
                continue
            scale = 1.0 if unit == "steps" else seconds[row.trainer] / 60
            for curve in curves:
                x = [point["steps"] * scale for point in curve]
                panel.plot(x, [point["mean"] for point in curve], color=colour, alpha=0.3, linewidth=0.8)
            steps = [p["steps"] for p in curves[0] if all(p["steps"] in (q["steps"] for q in c) for c in curves)]
            mean = [statistics.mean(p["mean"] for c in curves for p in c if p["steps"] == step) for step in steps]
            label = row.title.replace("`", "").replace("nnUNetTrainer", "")
            panel.plot([step * scale for step in steps], mean, color=colour, marker="o", label=label)
        panel.set_xlabel("training steps" if unit == "steps" else "minutes of training, one CPU thread")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test Dice, mean of both classes")
    panels[0][-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def report(results: dict[str, Any], docs: Path, name: str = "hippocampus") -> None:
    """Write the results file, the figure, and the tables into ``docs/results.md`` between their marks.

    Args:
        results: of :func:`collect`.
        docs: folder of the documentation.
        name: of ``TABLES``; also of the marks, the results file and the figure.

    Raises:
        UserError: the page has no marks.
    """
    page = docs / "results.md"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [*table(results), "", "Mean over the seeds on the way:", "", *curve_table(results), ""]
    if name == "hosts":
        lines += ["What SHTA changes, at the end:", "", *pairs_table(results), ""]
    lines += [f"![Learning curves](figures/{name}_curves.png)", "", f"Versions: {versions}."]
    page.write_text(fill(page, name, lines, WRITER))
    if speed := results["benchmark"]:
        plan = f"Hippocampus plan of above, {speed['device']}, {speed['machine']}, {speed['clock']}."
        page.write_text(fill(page, "benchmark", [benchmark_trainers.table(speed), "", plan], WRITER))

    (docs / "results").mkdir(parents=True, exist_ok=True)
    (docs / "results" / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_curves(results, docs / "figures" / f"{name}_curves.png")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "run", "report"))
    parser.add_argument("--dir", type=Path, default=Path("runs/hippocampus"), help="where all of it is kept")
    parser.add_argument("--data", type=Path, help="prepare: folder with images/, labels/ and protocol.json")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of a run, a multiple of 40")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the protocol's orders")
    parser.add_argument("--table", default="hippocampus", choices=list(TABLES))
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS], help="default: all of the table")
    parser.add_argument("--jobs", type=int, default=2, help="run: trainings at a time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    home, wanted = args.dir.resolve(), args.rows or TABLES[args.table]

    if args.what == "prepare":
        if args.data is None:
            raise UserError("prepare needs --data, the folder with images/, labels/ and protocol.json.")
        try:
            prepare(home, args.data.resolve(), args.seeds)
        except RuntimeError as error:
            raise UserError(f"preparing {error}") from None
    elif args.what == "measure":
        measure(home, args.device)
    elif args.what == "run":
        run_queue(plan_runs(home, args.steps, args.seeds, wanted, args.device), args.jobs)
    else:
        for run in plan_runs(home, args.steps, args.seeds, wanted, args.device):
            if run.summary(run.epochs).exists() and "HD95" not in dice_after(run, run.epochs):
                evaluate(evaluation_of(run, run.epochs))  # of a run before surface distances were measured
        speed_missing = not (home / "speed.json").is_file()
        rows = [row.key for row in ROWS if row.key in wanted and not (speed_missing and row.equal_time)]
        report(collect(plan_runs(home, args.steps, args.seeds, rows, args.device)), ROOT / "docs", args.table)


if __name__ == "__main__":
    main()
