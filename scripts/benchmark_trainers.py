"""Seconds and peak memory of a training step of each trainer, compared with nnU-Net's own on the same plan and machine.

    python scripts/benchmark_trainers.py                                    # a tiny plan, on a CPU
    python scripts/benchmark_trainers.py --plan 128 --page docs/results/cost.md     # nnU-Net's usual size, on a GPU
    python scripts/benchmark_trainers.py -d 4 -c 3d_fullres -p nnUNetPlans  # a prepared dataset with imagesUn
    python scripts/benchmark_trainers.py --trainers nnUNetTrainerURPC nnUNetTrainerSHTA_URPC

The first two make up their dataset. A turn of a trainer is a separate process, so nothing of it stays; the list is
gone through once a round. Some turns may be prepared at once (``--together 5``: a network takes longer to compile than
its steps take), but each has the device to itself while it is measured. A trainer that fails loses its row alone. Steps
are taken in the middle of the schedule, where ramp-ups are over, after some that are not timed. Trainers of two
networks are measured in both orders of passes. Warps are made in their trainer's first turn, untimed.

Time: a step of the trainer and one of nnUNetTrainer take turns, in one process, and the ratio is the median over these
pairs: a machine that is half as fast for a minute slows both. Reported are medians over rounds; ``range`` is that of
the rounds' ratios. A few batches are made first (augmentation, in this process: ``loader``) and take turns. On a GPU
they are pinned, the step moves them, cuDNN chooses its algorithms by trial, and networks are compiled unless
nnUNet_compile says otherwise, all as nnUNetv2_train does it. With one CPU thread the clock is the process's CPU time;
else it is wall-clock time.

Parts of a step, in separate steps that wait for the device at each border: ``forward`` is the networks,
``backward`` the backward passes, ``update`` what follows the last of them, and ``loss`` the rest: losses and
pseudo-labels, and SHTA's forward too.

Memory, without nnUNetTrainer's: on a GPU the most that torch's allocator had given away, cuDNN's workspaces among it.
On a CPU the process's peak beyond that after the imports.

Writes OUTPUT.json, after each turn, and prints its table; ``--page`` puts it into a Markdown page, between the marks
of the device. ``--table OUTPUT.json`` measures nothing and writes the table of an earlier run.
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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_ssl.benchmark.report import fill
from nnunet_ssl.errors import UserError
from nnunet_ssl.stock_commands import of_this_python
from nnunet_ssl.surroundings import surroundings
from nnunet_ssl.trainers import TRAINERS

BASELINE = "nnUNetTrainer"
WRITER = "scripts/benchmark_trainers.py"
WITH_TWO_NETWORKS = "CPS"  # how the names of those end that have two orders of passes
BATCHES = 5
PARTS = ("forward", "backward", "loss", "update")


class Plan(NamedTuple):
    """Of a made-up dataset: the patch in voxels, and channels by stage."""

    patch: tuple[int, int, int]
    features: tuple[int, ...]


PLANS = {"tiny": Plan((32, 32, 32), (8, 16, 32)), "128": Plan((128, 128, 128), (32, 64, 128, 256, 320, 320))}


@dataclass(frozen=True)
class Setup:
    """What every trainer is built from; plain values, so that it goes to other processes."""

    # dataset, configuration, plans: names, as nnU-Net knows them
    dataset: str
    configuration: str
    plans: str
    device: str  # cpu or cuda
    threads: int  # of torch on the CPU
    folder: str  # for settings and results, thrown away

    @property
    def cpu_time(self) -> bool:
        """Whether the clock is the process's CPU time."""
        return self.device == "cpu" and self.threads == 1

    def now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()


def trainers_to_measure(names: list[str]) -> list[tuple[str, str | None]]:
    """nnU-Net's own trainer and the ones in ``names``, each in all of its orders of passes, its default first."""
    found: list[tuple[str, str | None]] = [(BASELINE, None)]
    for name in names:
        found += [(name, "paired"), (name, "lean")] if name.endswith(WITH_TWO_NETWORKS) else [(name, None)]
    return found


def build(setup: Setup, trainer_name: str, passes: str | None) -> Any:
    """A trainer that is ready to step, with batches made in this process."""
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(setup.threads)
    config = Path(setup.folder) / f"{trainer_name}_{passes}.json"
    config.write_text(json.dumps({"seed": 0, **({"passes": passes} if passes else {})}))
    os.environ["nnUNet_ssl_config"] = str(config)
    os.environ["nnUNet_results"] = str(Path(setup.folder) / f"results_{os.getpid()}")
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


@dataclass
class Prepared:
    """A trainer or nnUNetTrainer after its first steps: graphs compiled, memory reserved."""

    trainer: Any
    batches: list[dict]
    loader: float  # seconds of a batch
    held: int  # bytes of the GPU between two steps, this one's alone

    def step(self, number: int) -> None:
        """One training step."""
        self.trainer.train_step(self.batches[number % len(self.batches)])


def make_ready(setup: Setup, warm_up: int, trainer_name: str, passes: str | None) -> Prepared:
    """Build a trainer, make its batches, and take its first steps."""
    before = torch.cuda.memory_allocated() if setup.device == "cuda" else 0
    trainer = build(setup, trainer_name, passes)
    start = setup.now()
    batches = [next(trainer.dataloader_train) for _ in range(BATCHES)]
    loader = (setup.now() - start) / BATCHES
    prepared = Prepared(trainer, pinned(batches, setup), loader, 0)
    for i in range(warm_up):
        prepared.step(i)
    if setup.device == "cuda":
        torch.cuda.synchronize()
        prepared.held = torch.cuda.memory_allocated() - before
    return prepared


ready: list[tuple[Prepared, Prepared, float]] = []  # of this process: what ``prepare`` leaves for ``turn``


def prepare(setup: Setup, warm_up: int, which: tuple[str, str | None]) -> None:
    """Make a trainer and nnUNetTrainer ready; called in a separate process, perhaps beside others.

    Args:
        setup: what the trainer is built from.
        warm_up: steps in which memory is reserved and networks are compiled.
        which: the trainer's name, and its passes.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        for name in (BASELINE, "nnUNetTrainerSSL"):  # imports all of nnU-Net's trainers, then ours: not counted
            recursive_find_trainer_class_by_name(name)
    before = resident_peak()
    own = make_ready(setup, warm_up, *which)
    peak = resident_peak() - before
    ready.append((own, make_ready(setup, warm_up, BASELINE, None), peak))
    if setup.device == "cuda":
        torch.cuda.empty_cache()  # for the others


def turn(setup: Setup, steps: int, warm_up: int) -> dict[str, float]:
    """Seconds, MiB and parameters of the trainer that is ready, and the ratio of its steps to nnUNetTrainer's."""
    own, baseline, peak = ready.pop()
    if setup.device == "cuda":  # as nnU-Net's run_training; by trial, so not beside others
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    for i in range(warm_up):
        own.step(i)
    if setup.device == "cuda":
        peak = (torch.cuda.max_memory_allocated() - baseline.held) / 2**20
    parts = parts_of_steps(own, steps, setup.now)
    for i in range(warm_up):
        baseline.step(i)
    seconds, its_seconds = [], []
    for i in range(steps):
        start = setup.now()
        own.step(i)
        middle = setup.now()
        baseline.step(i)
        seconds.append(middle - start)
        its_seconds.append(setup.now() - middle)
    ratio = statistics.median(a / b for a, b in zip(seconds, its_seconds, strict=True))
    modules = [own.trainer.network, getattr(own.trainer, "training_modules", torch.nn.Module())]
    parameters = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    step = statistics.median(seconds)
    return {"step": step, "ratio": ratio, "loader": own.loader, **parts, "peak": peak, "parameters": parameters}


def pinned(batches: list[dict], setup: Setup) -> list[dict]:
    """Batches as the step gets them: where there is a GPU, nnU-Net's workers pin them."""
    if setup.device != "cuda":
        return batches
    return tree_map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x, batches)


def parts_of_steps(prepared: Prepared, steps: int, now: Callable[[], float]) -> dict[str, float]:
    """Seconds of the parts of a step, means over so many steps."""
    spent: Counter[str] = Counter()
    entered = last = 0.0
    depth = 0  # an encoder may be called by itself or by its network, which are counted alike

    def enter(*_: Any) -> None:
        nonlocal entered, depth
        depth += 1
        if depth == 1:
            entered = now()

    def leave(part: str, *_: Any) -> None:
        nonlocal last, depth
        depth -= 1
        if depth == 0:
            last = now()
            spent[part] += last - entered

    backward = Tensor.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        enter()
        backward(*args, **kwargs)
        leave("backward")

    trainer = prepared.trainer
    networks = [*getattr(trainer, "_runnable", {"first": trainer.network}).values()]
    networks += [getattr(trainer, part) for part in ("_encode", "_decode") if hasattr(trainer, part)]
    hooks = [network.register_forward_pre_hook(enter) for network in networks]
    hooks += [network.register_forward_hook(partial(leave, "forward")) for network in networks]
    with mock.patch.object(Tensor, "backward", timed_backward):
        for i in range(steps):
            start = now()
            prepared.step(i)
            end = now()
            spent["step"] += end - start
            spent["update"] += end - last
    for hook in hooks:
        hook.remove()
    spent["loss"] = spent["step"] - spent["forward"] - spent["backward"] - spent["update"]
    return {part: spent[part] / steps for part in PARTS}


def resident_peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(
    setup: Setup, trainers: list[tuple[str, str | None]], args: argparse.Namespace, keep: Callable[[list[dict]], None]
) -> None:
    """For each trainer its turns in order, one a round; ``keep`` gets what is there after each turn."""
    # forked by a process that has imported what takes long and touches no GPU
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["nnunetv2.run.run_training", "nnunet_ssl.trainers.shta", "torch._dynamo"])
    results: list[dict] = [{"trainer": name, "passes": passes, "turns": []} for name, passes in trainers]
    order = list(range(len(trainers))) * args.rounds
    for first in range(0, len(order), args.together):
        group = [(results[i], ProcessPoolExecutor(1, processes)) for i in order[first : first + args.together]]
        jobs = [pool.submit(prepare, setup, args.warm_up, (r["trainer"], r["passes"])) for r, pool in group]
        wait(jobs)
        for number, ((result, pool), job) in enumerate(zip(group, jobs, strict=True), first + 1):
            print(f"turn {number} of {len(order)}: {result['trainer']} {result['passes'] or ''}", flush=True)
            try:
                job.result()
                result["turns"].append(pool.submit(turn, setup, args.steps, args.warm_up).result())
            except Exception as error:  # out of memory, say
                print(f"{result['trainer']} failed: {error!r}", flush=True)
            pool.shutdown()
            keep([entry for entry in results if entry["turns"]])


def make_dataset(folder: Path, plan: Plan, batch_size: int) -> tuple[str, str, str]:
    """A made-up dataset, planned and prepared in ``folder``; returns dataset, configuration and plans."""
    from nnunet_ssl.demo.dataset import DATASET, write_dataset
    from nnunet_ssl.demo.plans import shrink_plans

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    shape = tuple(round(1.2 * n) for n in plan.patch)
    write_dataset(folder / "nnUNet_raw", 0, labeled=5, unlabeled=4, test=0, shape=shape)
    words = ["nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "2", "-npfp", "2"]
    env = {**os.environ, "nnUNet_n_proc_DA": "1"}  # planning takes it for a number of threads
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(of_this_python(words, "cpu"), stdout=log, stderr=subprocess.STDOUT, env=env).returncode
    if code != 0:
        raise UserError(f"planning the made-up dataset failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    plans = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    shrink_plans(plans, "3d_fullres", plan.features, patch_size=plan.patch, batch_size=batch_size)
    return DATASET, "3d_fullres", "nnUNetPlans"


def table(results: dict[str, Any]) -> str:
    """The measurements and their ratios to nnU-Net's trainer, as Markdown."""
    columns = ["trainer", "passes", "step, ms", "ratio", "range", *(f"{part}, ms" for part in PARTS), "loader, ms"]
    columns += ["peak memory, MiB", "ratio", "parameters", "ratio"]
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    base = results["trainers"][0]
    for entry in results["trainers"]:

        def value(key: str, entry: dict = entry) -> float:
            return statistics.median(taken[key] for taken in entry["turns"])

        ratios = [taken["ratio"] for taken in entry["turns"]]
        peak, parameters = (value(key) / value(key, base) for key in ("peak", "parameters"))
        cells = [f"`{entry['trainer']}`", entry["passes"] or "", f"{1e3 * value('step'):.1f}"]
        cells += [f"{value('ratio'):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"]
        cells += [f"{1e3 * value(part):.1f}" for part in (*PARTS, "loader")]
        cells += [f"{value('peak'):.0f}", f"{peak:.2f}", f"{value('parameters'):,.0f}", f"{parameters:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    made_on = results["surroundings"]
    versions = ", ".join(f"{name} {made_on[name]}" for name in ("nnunetv2", "torch", "batchgeneratorsv2"))
    about = f"{results['plan']}; {results['rounds']} round(s), {results['clock']}; {made_on['machine']}, "
    return "\n".join([*lines, "", f"{about}{results['threads']} CPU thread(s); {versions}."])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="tiny", help="of the made-up dataset")
    parser.add_argument("--batch", type=int, default=2, help="patches of a batch of the made-up dataset")
    parser.add_argument("-d", help="a prepared dataset, name or id, instead of a made-up one")
    parser.add_argument("-c", default="3d_fullres", help="with -d: the configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="with -d: the plans")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), metavar="TRAINER", help="default: all of ours")
    parser.add_argument("-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU; nnU-Net takes 1 with a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="through the list")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="turns that are prepared at once")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of a turn before them")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="OUTPUT.json is written")
    parser.add_argument("--page", type=Path, help="a Markdown file that gets the table between its marks")
    parser.add_argument("--table", type=Path, metavar="OUTPUT.json", help="measure nothing: the table of this file")
    args = parser.parse_args(argv)

    if args.table:
        results = json.loads(args.table.read_text(encoding="utf-8"))
    else:
        results = run(args, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.page:
        lines = [table(results)]
        args.page.write_text(fill(args.page, results["surroundings"]["device"], lines, WRITER), encoding="utf-8")
    print(table(results))


def run(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure what the arguments ask for; the content of OUTPUT.json."""
    with tempfile.TemporaryDirectory() as temporary:
        if args.d is None:
            plan = PLANS[args.plan]
            which = make_dataset(Path(temporary), plan, args.batch)
            of_plan = f"Made-up data, batch {args.batch}, {' x '.join(map(str, plan.patch))} voxels, features "
            of_plan += ", ".join(map(str, plan.features))
        else:
            which = (args.d, args.c, args.p)
            of_plan = f"{args.p} of dataset {args.d}, {args.c}"
        setup = Setup(*which, device, args.threads, temporary)
        results = {
            "plan": of_plan,
            "clock": "CPU time" if setup.cpu_time else "wall-clock time",
            "rounds": args.rounds,
            "steps": args.steps,
            "threads": args.threads,
            "surroundings": surroundings(torch.device(device)),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)

        def keep(trainers: list[dict]) -> None:
            results["trainers"] = trainers
            args.output.with_name(args.output.name + ".json").write_text(json.dumps(results, indent=1) + "\n")

        measure(setup, trainers_to_measure(args.trainers), args, keep)
    return results


if __name__ == "__main__":
    main()
