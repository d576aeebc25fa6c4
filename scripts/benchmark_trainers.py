"""Seconds a step and peak memory of each trainer, as ratios to nnU-Net's own, on the same plan and machine.

    python scripts/benchmark_trainers.py                                   # a made-up dataset, needs nothing
    python scripts/benchmark_trainers.py --device cuda --patch 128 128 128 --features 32 64 128 256 320 320
    python scripts/benchmark_trainers.py -d 4 -c 3d_fullres -p nnUNetPlans # a prepared dataset with imagesUn
    python scripts/benchmark_trainers.py --trainers nnUNetTrainerURPC nnUNetTrainerSHTA_URPC

Time: all trainers live in one process and take turns, forwards and backwards through the list (ABBA), so whatever
drifts drifts for all. Steps are taken in the middle of the schedule, where ramp-ups are over. Reported is the median
over the turns, of making a batch (augmentation, in this process) and of the step itself. With one CPU thread the clock
is the thread's CPU time, which other programs on the machine do not disturb; else it is wall-clock time.

Memory: a process of its own for each trainer; its peak resident memory beyond that after the imports, or on a GPU the
peak that torch allocated.

Writes OUTPUT.json and OUTPUT.md, and prints the table; with ``--page`` into a Markdown page as well, between two marks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.report import fill
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers import TRAINERS

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "nnUNetTrainer"
MARKS, WRITER = "trainers", "scripts/benchmark_trainers.py"
KEYS = ("seconds_of_the_step", "seconds_a_step", "peak_mib", "parameters")  # of which the table gives ratios
WITH_TWO_NETWORKS = ("CPS", "GACPS")  # whose passes matter: measured both ways


def trainers_to_measure(names: list[str]) -> list[tuple[str, str | None]]:
    """nnU-Net's own trainer and those of ``names``, each with its default passes; two networks both ways."""
    found: list[tuple[str, str | None]] = [(BASELINE, None)]
    for name in names:
        found += [(name, "lean"), (name, "joint")] if name.endswith(WITH_TWO_NETWORKS) else [(name, None)]
    return found


@dataclass(frozen=True)
class Setup:
    """What every trainer is built from; plain values, so that it goes to other processes.

    Attributes:
        dataset, configuration, plans: names, as nnU-Net knows them.
        device: ``cpu`` or ``cuda``.
        threads: of torch on the CPU.
        folder: for settings and results, thrown away.
        trainers: names, and passes where they are not the default.
    """

    dataset: str
    configuration: str
    plans: str
    device: str
    threads: int
    folder: str
    trainers: tuple[tuple[str, str | None], ...]


def build(setup: Setup, trainer_name: str, passes: str | None, **more: Any) -> Any:
    """A trainer that is ready to step, with batches made in this process; ``more`` are settings."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(setup.threads)
    settings = {"seed": 0, **({"passes": passes} if passes else {}), **more}
    config = Path(setup.folder) / f"{trainer_name}_{passes}.json"
    config.write_text(json.dumps(settings))
    os.environ["nnUNet_ssl_config"] = str(config)
    os.environ["nnUNet_results"] = str(Path(setup.folder) / f"results_{passes}")
    os.environ["nnUNet_n_proc_DA"] = "0"
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        trainer = get_trainer_from_args(
            setup.dataset, setup.configuration, 0, trainer_name, setup.plans, device=torch.device(setup.device)
        )
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    if hasattr(trainer, "global_step"):
        trainer.global_step = trainer.total_steps // 2
    return trainer


def take_turn(trainer: Any, steps: int, clock: Any) -> tuple[float, float]:
    """Seconds to make a batch and seconds of a step, means over ``steps``."""
    import torch

    def now() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    start = now()
    batches = [next(trainer.dataloader_train) for _ in range(steps)]
    made = now()
    for batch in batches:
        trainer.train_step(batch)
    return (made - start) / steps, (now() - made) / steps


def measure_memory(setup: Setup, trainer_name: str, passes: str | None, steps: int) -> tuple[float, int]:
    """Peak memory of a trainer in MiB, and the parameters that it optimises; called in a fresh process."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        for name, _ in setup.trainers:  # the search imports all of nnU-Net's trainers before ours: that is not counted
            recursive_find_trainer_class_by_name(name)
    before = resident_peak()
    trainer = build(setup, trainer_name, passes)
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))
    modules = [trainer.network, getattr(trainer, "training_modules", torch.nn.Module())]
    parameters = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    if setup.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20, parameters
    return resident_peak() - before, parameters


def resident_peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_time(setup: Setup, repeats: int, steps: int) -> list[dict[str, float]]:
    """Median seconds of each of the trainers, taking turns."""
    clock = time.process_time if setup.device == "cpu" and setup.threads == 1 else time.perf_counter
    trainers = [build(setup, *which) for which in setup.trainers]
    for trainer in trainers:  # warm-up: allocators, compilation, the choice of algorithms
        take_turn(trainer, max(2, steps // 4), clock)
    turns: list[list[tuple[float, float]]] = [[] for _ in trainers]
    for repeat in range(repeats):
        forwards = list(enumerate(trainers))
        for index, trainer in forwards if repeat % 2 == 0 else reversed(forwards):
            turns[index].append(take_turn(trainer, steps, clock))
        print(f"turn {repeat + 1} of {repeats}", flush=True)
    results = []
    for own in turns:
        batch, step = (statistics.median(values) for values in zip(*own, strict=True))
        quartiles = statistics.quantiles([b + s for b, s in own], n=4) if len(own) > 1 else [batch + step] * 3
        results.append(
            {
                "seconds_a_batch": batch,
                "seconds_of_the_step": step,
                "seconds_a_step": batch + step,
                "interquartile_range": quartiles[2] - quartiles[0],
            }
        )
    return results


def make_dataset(
    folder: Path, patch: tuple[int, ...], features: tuple[int, ...], batch_size: int
) -> tuple[str, str, str]:
    """A made-up dataset, planned and prepared in ``folder``; returns dataset, configuration and plans."""
    from nnunet_ssl.demo.dataset import DATASET, write_dataset
    from nnunet_ssl.demo.plans import shrink_plans

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    shape = tuple(round(1.2 * n) for n in patch)
    write_dataset(folder / "nnUNet_raw", 0, labeled=5, unlabeled=4, test=0, shape=shape)
    plan = [str(Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"), "-d", "1", "-c", "3d_fullres"]
    plan += ["-np", "2", "-npfp", "2"]
    env = {**os.environ, "nnUNet_n_proc_DA": "1"}  # planning takes it for a number of threads
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(plan, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
    if code != 0:
        raise UserError(f"planning the made-up dataset failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    plans = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    shrink_plans(plans, "3d_fullres", features, patch_size=patch, batch_size=batch_size)
    return DATASET, "3d_fullres", "nnUNetPlans"


def table(results: dict[str, Any]) -> str:
    """The measurements and their ratios to nnU-Net's trainer, as Markdown."""
    base = results["trainers"][0]
    lines = [
        "| trainer | passes | step, s | ratio | batch, s | batch and step, s | ratio | peak memory, MiB | ratio "
        "| parameters | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in results["trainers"]:
        ratios = [entry[key] / base[key] for key in KEYS]
        lines.append(
            f"| `{entry['trainer']}` | {entry['passes'] or ''} | {entry['seconds_of_the_step']:.4f} | {ratios[0]:.2f} "
            f"| {entry['seconds_a_batch']:.4f} | {entry['seconds_a_step']:.4f} | {ratios[1]:.2f} "
            f"| {entry['peak_mib']:.0f} | {ratios[2]:.2f} | {entry['parameters']:,} | {ratios[3]:.3f} |"
        )
    plan = f"{results['plans']} of {results['dataset']}, {results['configuration']}"
    return "\n".join([*lines, "", f"{plan}; {results['device']}, {results['machine']}, {results['clock']}."])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", help="a prepared dataset, name or id, instead of a made-up one")
    parser.add_argument("-c", default="3d_fullres", help="with -d: the configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="with -d: the plans")
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 32, 32], help="of the made-up plan")
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32], help="of the made-up plan, by stage")
    parser.add_argument("--batch", type=int, default=2, help="of the made-up plan")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), metavar="TRAINER", help="default: all of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=8, help="turns of each trainer")
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="OUTPUT.json and OUTPUT.md are written")
    parser.add_argument("--page", type=Path, help="a Markdown file that gets the table between its marks")
    args = parser.parse_args(argv)

    import torch  # the children of this process start with a clean slate (spawn), so their peak is their own

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.d is None:
            which = make_dataset(folder, tuple(args.patch), tuple(args.features), args.batch)
        else:
            which = (args.d, args.c, args.p)
        setup = Setup(*which, device, args.threads, temporary, tuple(trainers_to_measure(args.trainers)))
        memory = []
        for trainer, passes in setup.trainers:
            print(f"memory of {trainer} {passes or ''}", flush=True)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory.append(pool.submit(measure_memory, setup, trainer, passes, 4).result())
        times = measure_time(setup, args.repeats, args.steps)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{args.threads} CPU thread(s)"
    results = {
        **{key: value for key, value in asdict(setup).items() if key not in ("folder", "trainers")},
        **({"patch": args.patch, "features": args.features, "batch": args.batch} if args.d is None else {}),
        "machine": machine,
        "clock": "CPU time" if device == "cpu" and args.threads == 1 else "wall-clock",
        "versions": {name: version(name) for name in ("nnunetv2", "torch", "batchgeneratorsv2")},
        "trainers": [
            {"trainer": trainer, "passes": passes, **timing, "peak_mib": peak, "parameters": parameters}
            for (trainer, passes), timing, (peak, parameters) in zip(setup.trainers, times, memory, strict=True)
        ],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_name(args.output.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_name(args.output.name + ".md").write_text(table(results) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text(fill(args.page, MARKS, [table(results)], WRITER), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
