"""``nnUNetv2_ssl_benchmark``: from a protocol to a table, by nnU-Net's own commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nnunet_ssl.commands.arguments import Parser, count
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.benchmark.plan import Plan

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"  # in a checkout; an installation has none


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.
    """
    parser = Parser(
        prog="nnUNetv2_ssl_benchmark",
        description="Do what a protocol says, from raw data to the table: make datasets with few labels, plan, "
        "prepare, train, predict, evaluate, compare, report. A stopped benchmark goes on where it was; what is done "
        "is not done again.",
    )
    parser.add_argument("protocol", nargs="?", help="A JSON file, or the name of a protocol that --list shows")
    parser.add_argument("--list", action="store_true", help="Show the protocols that come with the package")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Folder of the published data, for the prepare script")
    parser.add_argument("-o", type=Path, metavar="DIR", help="Folder for all results. Default: benchmark_<name>")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="Default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--jobs", type=count, default=1, help="Trainings at a time. Default: 1. Measuring is one by one"
    )
    parser.add_argument(
        "-np", type=count, help="Processes that prepare and evaluate. Default: 8, or the number of cores"
    )
    parser.add_argument("--scripts", type=Path, metavar="DIR", help="Folder of prepare_*.py. Default: the checkout's")
    parser.add_argument("--page", type=Path, metavar="FILE", help="A Markdown file that gets the report between marks")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="Print the commands as a shell script, and do nothing")
    what.add_argument("--report", action="store_true", help="Only report on what is finished")
    args = parser.parse_args(argv)

    from nnunet_ssl.benchmark.protocol import load_json, read_protocol, shipped

    if args.list:
        for name, file in shipped().items():
            print(f"{name:<13} {load_json(str(file))[0]['about']}")
        return
    if args.protocol is None:
        raise UserError(f"name a protocol: a JSON file, or one of {', '.join(shipped())}.")
    protocol = read_protocol(args.protocol)

    # heavy: only once the arguments are known to be good
    import torch

    from nnunet_ssl.benchmark.plan import Machine, Plan
    from nnunet_ssl.benchmark.report import is_finished
    from nnunet_ssl.benchmark.run import Benchmark, begun_with, claimed, known_ids, refuse_other, script_of
    from nnunet_ssl.unlabeled.find import required_folder

    home = (args.o or Path(f"benchmark_{protocol.name}")).resolve()
    device = args.device or begun_with(home) or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not (torch.cuda.is_available() or args.dry_run or args.report):
        raise UserError(f"torch sees no GPU here; take --device cpu, with another -o if {home} was begun with a GPU.")
    machine = Machine(
        device=device,
        processes=args.np or min(8, os.cpu_count() or 1),
        raw=Path(required_folder("nnUNet_raw")).resolve(),
        preprocessed=Path(required_folder("nnUNet_preprocessed")).resolve(),
        data=args.data.resolve() if args.data else Path("DATA"),
        scripts=(args.scripts or SCRIPTS).resolve(),
    )
    plan = Plan(protocol, home, machine, known_ids(home))
    benchmark = Benchmark(plan, args.jobs)
    if args.dry_run:
        print("\n".join(script_of(benchmark)))
        return
    given = load_json(args.protocol)[0]
    if args.report:  # of a benchmark that may be running
        refuse_other(home, given, device)
        report(plan, args.page)
        return
    with claimed(home, given, device):
        benchmark.check_source()
        before = signal.signal(signal.SIGTERM, _end)
        try:
            failed = benchmark.run()
        finally:
            signal.signal(signal.SIGTERM, before)
        if failed is None or any(is_finished(plan, run) for run in plan.queue()):
            report(plan, args.page)
    if failed is not None:
        raise UserError(failed)


def report(plan: Plan, page: Path | None) -> None:
    """Write the report, and say what it says and where it is."""
    from nnunet_ssl.benchmark.report import write_report

    print(write_report(plan, page))
    print(f"Wrote {plan.home / 'report.md'}, {plan.home / 'results.json'} and {plan.home / 'curves.png'}")


def _end(number: int, frame: FrameType | None) -> None:
    """What ``kill`` does: the same as Ctrl-C, so that no command is left running."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
