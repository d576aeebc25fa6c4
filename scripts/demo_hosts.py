"""SHTA on each of its hosts, organ by organ, on the demo's made-up dataset with its small and thin organs.

    python scripts/demo_hosts.py --dir runs/demo_hosts --jobs 2
    python scripts/demo_hosts.py --dir runs/demo_hosts --report --page docs/results/demo.md
    python scripts/demo_hosts.py --rows-of docs/results/hippocampus_choices_protocol.json --dir runs/demo_choices

Draws the demo's cases with all their labels, writes a protocol, and leaves the rest to ``nnUNetv2_ssl_benchmark``: it
hides all labels but five, trains each host with and without SHTA, and predicts the ten test cases. One seed, network
and patch of the demo. ``--rows-of`` takes name, rows and seeds of another protocol, and an order of the cases a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from nnunet_ssl.demo.dataset import DATASET, LABELED, TEST, UNLABELED, write_dataset
from nnunet_ssl.demo.run import CONFIGURATION, EPOCHS, FEATURES, PATCH_SIZE, STEPS_AN_EPOCH

NAME = "demo_hosts"
HOSTS = {"LabeledOnly": "Labels only", "CPS": "CPS", "GACPS": "GA-CPS", "URPC": "URPC", "MagicNet": "MagicNet"}


def protocol(test_list: Path, rows_of: Path | None = None) -> dict[str, object]:
    """Each host and SHTA on it, as long as the demo trains, or the rows of another protocol."""
    rows, seeds, name = [], [0], NAME
    for host, title in HOSTS.items():
        rows.append({"name": title, "trainer": f"nnUNetTrainer{host}"})
        rows.append({"name": f"{title} + SHTA", "trainer": f"nnUNetTrainerSHTA_{host}", "against": title})
    if rows_of is not None:
        given = json.loads(rows_of.read_text(encoding="utf-8"))
        rows, seeds, name = given["rows"], given["seeds"], f"demo_{given['name'].partition('_')[2]}"
    return {
        "name": name,
        "about": f"The demo's made-up dataset, {LABELED} of {LABELED + UNLABELED} cases labelled, {TEST} test cases.",
        "data": {"dataset": DATASET, "test": str(test_list), "order_by_seed": rows_of is not None},
        "first_id": 2,
        "labeled": [LABELED],
        "seeds": seeds,
        "configuration": CONFIGURATION,
        "plans": "nnUNetPlans_demo",
        "shrink": {"features": list(FEATURES), "patch_size": list(PATCH_SIZE), "batch_size": 2},
        "rows": rows,
        "epochs": EPOCHS,
        "budgets": [{"steps": EPOCHS * STEPS_AN_EPOCH}],
        "predict": ["--disable_tta"],
        "metrics": ["dice", "hd95"],
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point; arguments that are not ours go to ``nnUNetv2_ssl_benchmark``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs") / NAME, help="where all of it is kept")
    parser.add_argument("--rows-of", type=Path, help="a protocol whose rows and seeds to take instead")
    args, others = parser.parse_known_args(argv)
    home = args.dir.resolve()
    folders = {name: home / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    raw = folders["nnUNet_raw"] / DATASET
    if not raw.is_dir():
        write_dataset(raw.parent, seed=0, labeled=LABELED + UNLABELED + TEST, unlabeled=0, test=0)
    test_list, file = home / "test.txt", home / "protocol.json"
    test_list.write_text("".join(f"case_{n:03d}\n" for n in range(LABELED + UNLABELED, LABELED + UNLABELED + TEST)))
    file.write_text(json.dumps(protocol(test_list, args.rows_of), indent=2))
    command = [sys.executable, "-m", "nnunet_ssl.commands.benchmark", str(file), "-o", str(home / "benchmark"), *others]
    sys.exit(subprocess.run(command, env={**os.environ, **{k: str(v) for k, v in folders.items()}}).returncode)


if __name__ == "__main__":
    main()
