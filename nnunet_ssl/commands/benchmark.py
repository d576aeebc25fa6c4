"""``nnUNetv2_ssl_benchmark``: from a protocol to a table, by nnU-Net's own commands, as a Snakemake workflow."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from nnunet_ssl.commands.arguments import Parser, add_shared, count, find_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_json
from nnunet_ssl.names import FOLDERS

if TYPE_CHECKING:
    from nnunet_ssl.benchmark.runs import Benchmark

SNAKEFILE = Path(__file__).resolve().parents[1] / "benchmark" / "Snakefile"
CANCELLED = 60  # seconds that Snakemake has to end its jobs, on a cluster as well


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_benchmark",
        description="Run a protocol from raw data to the final table: make datasets with few labels, plan, "
        "preprocess, train, predict, evaluate, compare, report. A stopped benchmark resumes where it was; finished "
        "steps are not repeated.",
        epilog="All other options are passed to Snakemake, which runs the workflow: --executor slurm, --profile DIR, "
        "--retries N, --set-resources train:runtime=600 and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("protocol", nargs="?", help="JSON file, or the name of a protocol that --list shows")
    parser.add_argument("--list", action="store_true", help="Show the protocols that come with the package")
    add_shared(parser, "-o", help="Folder to write to. Default: benchmark_<name>")
    add_shared(parser, "--data")
    add_shared(
        parser, "-device",
        help="Device. Default: the one the benchmark was started with; otherwise cuda if there is a GPU, or cpu",
    )  # fmt: skip
    add_shared(parser, "--device")
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N",
        help="Parallel trainings; seconds per step are always measured one run at a time. Default: 1",
    )  # fmt: skip
    add_shared(
        parser, "-np", help="Parallel processes for preparing and evaluating. Default: the number of cores, at most 8"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="Markdown file that receives the report between its two marks"
    )
    parser.add_argument(
        "--resources", nargs="+", default=[], metavar="NAME=N",
        help="Snakemake's: limits for all jobs that run at the same time, such as mem_mb=64000",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    add_shared(what, "--dry-run")
    what.add_argument("--report", action="store_true", help="Report on what has finished, and do nothing else")
    args, passed_on = parser.parse_known_args(argv)

    from nnunet_ssl.benchmark.reading import load_json, read_protocol, shipped

    if args.list:
        for name, file in shipped().items():
            print(f"{name:<18} {load_json(str(file))[0]['about']}")
        return
    if args.protocol is None:
        raise UserError(f"name a protocol: a JSON file, or one of {', '.join(shipped())}.")
    protocol = read_protocol(args.protocol)

    # heavy: only once the arguments are known to be good
    from nnunet_ssl.benchmark.folder import (
        IDS,
        SNAPSHOT,
        begun_with,
        claimed,
        ids_of_others,
        known_ids,
        refuse_other,
        reserve,
        reserving,
        with_own_lists,
    )  # fmt: skip
    from nnunet_ssl.benchmark.runs import Benchmark
    from nnunet_ssl.unlabeled.find import required_folder

    home = (args.folder or Path(f"benchmark_{protocol.name}")).resolve()
    here = find_device(None)
    device = args.device or begun_with(home) or here
    if device == "cuda" != here and not (args.dry_run or args.report or passed_on):
        raise UserError(f"torch sees no GPU here; take -device cpu, with another -o if {home} was started with a GPU.")
    raw, preprocessed = (Path(required_folder(f"nnUNet_{name}")).resolve() for name in ("raw", "preprocessed"))
    benchmark = Benchmark(protocol, home, raw, preprocessed, known_ids(home), ids_of_others(raw, home))
    given, file = load_json(args.protocol)
    if args.report:  # of a benchmark that may be running
        refuse_other(home, given, device)
        report(benchmark, args.page)
        return
    if importlib.util.find_spec("snakemake") is None:
        raise UserError('Snakemake is missing; pip install "nnunet-ssl[benchmark]", in Python 3.11 or newer.')
    processes = args.processes or min(8, os.cpu_count() or 1)
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--directory", str(home)]
    # --jobs says how many run at a time; so many cores put no cap on those that a job may ask a cluster for
    words += f"--cores {sys.maxsize} --jobs {args.jobs} --resources training={args.jobs}".split() + args.resources
    # a file that is newer, or another list of them, is a reason to do a step again; another number of processes is not
    words += "--rerun-triggers mtime input --rerun-incomplete --keep-going --nolock --printshellcmds".split()
    config = {"device": device, "processes": str(processes), "jobs": str(args.jobs)}
    config["data"] = str(args.data.resolve() if args.data else "DATA")
    if args.page:
        config["page"] = str(args.page.resolve())

    def snakemake(protocol: Path, *options: str) -> int:
        # one value, in JSON: of a plain one Snakemake, which reads YAML, would drop what follows a #
        told = json.dumps({**config, "protocol": str(protocol)}, ensure_ascii=False)
        return run([*words, *passed_on, "--config", f"told={told}", *options])

    if args.dry_run:
        existed = home.exists()
        code = snakemake(file.resolve(), "--dry-run")
        if not existed and home.is_dir():
            shutil.rmtree(home)  # Snakemake works in it
        if code:
            raise UserError("Snakemake cannot plan this; its message is above.")
        return
    with claimed(home, given, device):
        check_source(benchmark, args.data)
        with reserving(raw):
            benchmark = Benchmark(protocol, home, raw, preprocessed, known_ids(home), ids_of_others(raw, home))
            write_json(home / IDS, benchmark.ids)
            reserve(raw, home, benchmark.all_ids())
        # jobs on a cluster read the protocol when they begin, and the user's file may be another one by then
        write_json(home / SNAPSHOT, with_own_lists(home, given, file))
        for mark in benchmark.failed_measurements():
            mark.unlink()
        code = snakemake(home / SNAPSHOT)
        unmeasured = [mark.name for mark in benchmark.failed_measurements()]
        if code and any(map(benchmark.is_finished, benchmark.queue())):
            report(benchmark, args.page)
    if code or unmeasured:
        what = "Snakemake names it above"
        if unmeasured:
            what = f"how long a step takes could not be measured ({', '.join(unmeasured)}), so these rows wait"
        raise UserError(
            f"something failed: {what}; its log is in {home / 'logs'}. The rest is done. "
            "Fix it and start again: finished steps are not repeated."
        )


def check_source(benchmark: Benchmark, data: Path | None) -> None:
    """Check that the published data are there, if a dataset still has to be made from them.

    Raises:
        UserError: they are not.
    """
    published = benchmark.protocol.data.published
    made = all((benchmark.home / "done" / f"dataset_{number}").exists() for number in benchmark.sources())
    if published is not None and not made and (data is None or not data.is_dir()):
        raise UserError(
            f"{data or 'DATA'} is not a folder; name the folder of the published data with --data. "
            f"nnUNetv2_ssl_dataset {published} --help lists what it must contain"
        )


def run(words: list[str]) -> int:
    """Run Snakemake; it and all its commands end with this process, no matter how it ends.

    Returns:
        The exit code.
    """
    from nnunet_ssl.stock_commands import running

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Snakemake works in another folder, where relative paths would mean others
    folders = {name: os.path.abspath(os.environ[name]) for name in FOLDERS if name in os.environ}
    env = {**os.environ, **folders, "PATH": path, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with running(words, env=env) as process:
            try:
                return process.wait()
            except BaseException:
                cancel(process)
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def cancel(process: subprocess.Popen[bytes]) -> None:
    """Interrupt Snakemake and its local commands as Ctrl-C does, so that it takes its jobs off a cluster."""
    children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        try:
            child.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=CANCELLED)


def report(benchmark: Benchmark, page: Path | None) -> None:
    """Write the report, print it, and say where it is."""
    from nnunet_ssl.benchmark.report import write_report

    print(write_report(benchmark, page))
    home = benchmark.home
    print(f"Wrote {home / 'report.md'}, {home / 'results.json'} and {home / 'curves.png'}")


def _end(number: int, frame: FrameType | None) -> None:
    """What ``kill`` does: the same as Ctrl-C, so that no command is left running."""
    raise SystemExit(128 + number)
