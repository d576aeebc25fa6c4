"""Four trainings as jobs of a real SLURM, one of them killed on the way.

On a machine of one's own ``tests/benchmark/one_node_slurm.sh`` sets SLURM up on Debian's packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from nnunet_ssl.demo.dataset import write_dataset

PROTOCOL = {
    "name": "slurm",
    "data": {"dataset": 1, "test": "test.txt", "validation": 1},
    "first_id": 2,
    "labeled": [2],
    "seeds": [0, 1],
    "plans": "small",
    "shrink": {"features": [4, 6, 8], "patch_size": [16, 16, 16], "batch_size": 2},
    "rows": [
        {"name": "Labels only", "trainer": "nnUNetTrainerLabeledOnly"},
        {"name": "URPC", "trainer": "nnUNetTrainerURPC"},
    ],
    "epochs": 3,
    "budgets": [{"steps": 90}],
    "predict": ["--disable_tta"],
}


def jobs(*options):
    """Lines of ``squeue``."""
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no SLURM answers here; tests/benchmark/one_node_slurm.sh sets one up",
)
def test_jobs_of_slurm(fresh_folders, tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install snakemake-executor-plugin-slurm")
    write_dataset(fresh_folders.raw, 0, labeled=7, unlabeled=1, test=0, shape=(20, 24, 22))
    (tmp_path / "test.txt").write_text("case_005\ncase_006\n")
    protocol, home = tmp_path / "protocol.json", tmp_path / "out"
    protocol.write_text(json.dumps(PROTOCOL))
    words = [sys.executable, "-m", "nnunet_ssl.commands", "benchmark", protocol, "-device", "cpu", "-o", home]
    words += ["-np", 1, "--jobs", 2, "--executor", "slurm", "--latency-wait", 10]
    words += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", 5]  # no accounting
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        begun = subprocess.Popen([*map(str, words)], stdout=stream, stderr=subprocess.STDOUT)
        fold = "runs/steps90/urpc_2labeled_seed1/results/*/*/fold_0/"
        while not list(home.glob(fold + "checkpoint_best.pth")):
            assert begun.poll() is None, log.read_text()
            time.sleep(0.1)
        # the job that trains this run, by the file that its process has been told
        mine = [line.split()[0] for line in jobs("--format=%i %j %k") if "urpc_2labeled_seed1" in line]
        assert mine, jobs("--format=%i %j %k")
        subprocess.run(["scancel", "--signal=KILL", *mine], check=True)
        subprocess.run(["scancel", *mine], check=True)
        assert begun.wait() == 1, log.read_text()
    done = sorted(file.parent.name for file in home.glob("done/steps90/*/train"))
    assert done == ["labels_only_2labeled_seed0", "labels_only_2labeled_seed1", "urpc_2labeled_seed0"], log.read_text()
    assert "Not finished and left out above: URPC" in (home / "report.md").read_text()
    before = {file: os.stat(file).st_mtime_ns for file in home.glob("done/**/train")}

    with log.open("w") as stream:
        assert subprocess.run([*map(str, words)], stdout=stream, stderr=subprocess.STDOUT).returncode == 0, (
            log.read_text()
        )
    assert before.items() <= {file: os.stat(file).st_mtime_ns for file in home.glob("done/**/train")}.items()
    assert json.loads((home / "results.json").read_text())["unfinished"] == []
    # it went on with its checkpoint: no epoch before it was trained again
    assert len(list(home.glob(fold + "training_log_*.txt"))) == 2
    assert jobs() == []
