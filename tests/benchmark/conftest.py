"""A small protocol on a dataset that is split, and the benchmark that it makes."""

from __future__ import annotations

import copy
import json

import pytest

from nnunet_ssl.benchmark.reading import read_protocol
from nnunet_ssl.benchmark.runs import Benchmark

PROTOCOL = {
    "name": "made_up",
    "about": "Five made-up organs",
    "data": {"dataset": 1, "test": "test.txt", "validation": 1, "order_by_seed": True},
    "first_id": 500,
    "labeled": [2],
    "seeds": [0, 1],
    "rows": [
        {"name": "Labels only", "trainer": "nnUNetTrainerLabeledOnly"},
        {"name": "CPS", "trainer": "nnUNetTrainerCPS", "settings": {"cps_weight": 0.5}},
        {"name": "CPS + SHTA", "trainer": "nnUNetTrainerSHTA_CPS", "against": "CPS"},
        {"name": "More labels", "trainer": "nnUNetTrainerLabeledOnly", "labeled": 4},
    ],
    "epochs": 4,
    "budgets": [{"steps": 80}, {"time_of": "CPS"}],
    "curve": [0.5, 1],
    "metrics": ["dice", "hd95"],
    "measure": {"epochs": 3, "iterations": 10, "rounds": 2},
}


@pytest.fixture
def given():
    """A protocol that a test may change."""
    return copy.deepcopy(PROTOCOL)


@pytest.fixture
def write_protocol(tmp_path):
    """``write_protocol(given)``: the file of a protocol, with its list of test cases beside it."""
    (tmp_path / "test.txt").write_text("case_006\ncase_007\n")

    def write(content):
        file = tmp_path / "protocol.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


@pytest.fixture
def make_benchmark(tmp_path, write_protocol):
    """``make_benchmark(given)``: what a protocol comes to, below this test's folder."""
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    raw.mkdir(exist_ok=True)
    preprocessed.mkdir(exist_ok=True)

    def make(content, ids=None, reserved=()):
        protocol = read_protocol(str(write_protocol(content)))
        return Benchmark(protocol, tmp_path / "home", raw, preprocessed, ids, reserved)

    return make


@pytest.fixture
def write_times():
    """``write_times(folder, [2.0, 1.0])``: the log and the record of a training with these seconds per epoch."""
    made_on = [{"device": "cpu", "machine": "A processor", "nnunetv2": "2.8.1"}]

    def write(folder, seconds):
        fold = folder / "results" / "Dataset500_X" / "nnUNetTrainerX__nnUNetPlans__3d_fullres" / "fold_0"
        fold.mkdir(parents=True)
        (fold / "ssl_settings.json").write_text(json.dumps({"made_on": made_on}))
        lines = []
        for epoch, time in enumerate(seconds):
            lines += [f"2026-01-01 10:00:00.1: Epoch {epoch} ", f"2026-01-01 10:00:01.1: Epoch time: {time} s "]
        (fold / "training_log_2026_1_1_10_00_00.txt").write_text("\n".join(lines))

    return write
