"""What SASNet's distance maps, reweighting and views cost, as shares of a step, on the paper's patch.

    python scripts/benchmark_sasnet.py                                 # 112 x 112 x 80, five stages from 16 features
    python scripts/benchmark_sasnet.py -device cuda --views rotate

A made-up dataset, batch 2 + 2, single precision on a CPU, as nnU-Net does it. The step is the trainer's own; its parts
are timed where they are called. nnU-Net's workers make batches in parallel with the step, so views are stated as a
share of the step too. With one CPU thread the clock is the thread's CPU time, else wall-clock time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_trainers import Setup, build, make_dataset

TRAINER = "nnUNetTrainerSASNet"


def timed(function: Callable, part: str, spent: dict[str, float], now: Callable[[], float]) -> Callable:
    """``function``, whose time is added to ``spent[part]``."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += now() - start

    return wrapper


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[112, 112, 80])
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="by stage")
    parser.add_argument("--views", choices=("permute", "rotate"), default="permute")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(argv)

    import torch

    from nnunet_ssl.trainers.sasnet import trainer as sasnet
    from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.device == "cpu" and args.threads == 1 else time.perf_counter()

    with tempfile.TemporaryDirectory() as temporary:
        which = make_dataset(Path(temporary), tuple(args.patch), tuple(args.features), 2)
        os.environ["nnUNet_n_proc_DA"] = "0"
        setup = Setup(*which, args.device, args.threads, temporary)
        trainer = build(setup, TRAINER, None, sasnet_views=args.views)
        spent: dict[str, float] = defaultdict(float)
        sasnet.signed_distance_maps = timed(sasnet.signed_distance_maps, "SDM", spent, now)
        for name in ("true_class_confidence", "reweight"):
            setattr(sasnet, name, timed(getattr(sasnet, name), "SAR", spent, now))
        for name in ("read", "write"):
            setattr(ConfidenceMemory, name, timed(getattr(ConfidenceMemory, name), "SAR", spent, now))

        batch = next(trainer.dataloader_train)
        trainer.train_step(batch)  # warm-up
        spent.clear()
        start = now()
        for _ in range(args.steps):
            trainer.train_step(batch)
        step = (now() - start) / args.steps

        view, start = trainer.view_transform(), now()
        for images, coordinates in ((batch["data"], batch["coordinates"]), (batch["unlabeled"], None)):
            for i, image in enumerate(images):
                target = {} if coordinates is None else {"regression_target": coordinates[i].nan_to_num()}
                view(image=image, segmentation=batch["target"][0][i], **target)
        parts = {part: seconds / args.steps for part, seconds in spent.items()} | {"views": now() - start}
    result = {
        "patch": args.patch,
        "features": args.features,
        "views": args.views,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU thread(s)",
        "seconds_of_the_step": step,
        "share_of_the_step": {part: seconds / step for part, seconds in parts.items()},
    }
    print(json.dumps(result, indent=1))
    print(f"together {sum(parts.values()) / step:.1%} of the step")


if __name__ == "__main__":
    main()
