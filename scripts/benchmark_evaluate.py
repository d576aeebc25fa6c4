"""How long ``nnUNetv2_ssl_evaluate`` takes compared with ``nnUNetv2_evaluate_folder``, and how its time grows.

    python scripts/benchmark_evaluate.py -ref labelsTs -pred predictions -djfile dataset.json -pfile plans.json

The commands take turns, with one process each; given is the median processor time of the whole command. Then surface
metrics of two balls in ever larger volumes: they have to follow the box around the balls, not the volume.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nnunet_ssl.evaluation.metrics import Options, case_metrics
from nnunet_ssl.stock_commands import executable

BALLS = (8, 16, 32)  # radius in voxels
VOLUMES = (80, 160, 240)  # voxels along each axis


def processor_seconds(words: list[str]) -> float:
    """Processor time of a command and of all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(args: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """Title -> command, nnU-Net's first."""
    stock = [executable("nnUNetv2_evaluate_folder"), args.ref, args.pred, "-djfile", args.djfile, "-pfile", args.pfile]
    ours = [sys.executable, "-m", "nnunet_ssl.commands.evaluate", "-ref", args.ref, "-pred", args.pred]
    ours += ["-djfile", args.djfile, "-np", "1", "-o", str(out / "ours")]
    return {
        "`nnUNetv2_evaluate_folder`": [*stock, "-np", "1", "-o", str(out / "summary.json")],
        "`nnUNetv2_ssl_evaluate --metrics dice`": [*ours, "--metrics", "dice"],
        "`nnUNetv2_ssl_evaluate`": ours,
    }


def ball(size: int, radius: int, shift: int) -> np.ndarray:
    """A ball off the middle of a volume."""
    axis = np.arange(size) - size // 2
    return (((axis - shift) ** 2)[:, None, None] + (axis**2)[:, None] + axis**2 <= radius**2).astype(np.uint8)


def surface_seconds(size: int, radius: int) -> float:
    """The time of the surface metrics of a ball and a shifted one on top of the overlap, the least of nine."""
    truth, guess = ball(size, radius, 0), ball(size, radius, radius // 4)
    seconds = {}
    for metrics in (("dice",), ("dice", "hd95", "asd")):
        times = []
        for _ in range(9):
            start = time.process_time()
            case_metrics(truth, guess, [1], (1.0, 1.0, 1.0), Options(metrics))
            times.append(time.process_time() - start)
        seconds[metrics] = min(times)
    return seconds["dice", "hd95", "asd"] - seconds["dice",]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, what in (("-ref", "true label maps"), ("-pred", "predicted label maps"), ("-djfile", "dataset.json"),
                         ("-pfile", "plans.json")):  # fmt: skip
        parser.add_argument(option, required=True, help=what)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = commands(args, Path(folder))
        seconds = {title: [] for title in words}
        for _ in range(args.repeats):
            for title in words:
                seconds[title].append(processor_seconds(words[title]))
    median = {title: statistics.median(values) for title, values in seconds.items()}
    print("| command | processor, s | ratio |\n| --- | ---: | ---: |")
    stock = next(iter(median.values()))
    for title, value in median.items():
        print(f"| {title} | {value:.2f} | {value / stock:.2f} |")
    print("\n| HD95 and ASD, ms | " + " | ".join(f"in {size}³ voxels" for size in VOLUMES) + " |")
    print("| --- |" + " ---: |" * len(VOLUMES))
    for radius in BALLS:
        cells = [f"{1000 * surface_seconds(size, radius):.1f}" for size in VOLUMES]
        print(f"| ball of radius {radius} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
