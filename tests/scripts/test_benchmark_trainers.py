"""The benchmark's table: measured by processes that take turns, and drift cancels."""

from __future__ import annotations

import json

import benchmark_trainers
import pytest


def a_turn(step: float) -> dict[str, float]:
    parts = dict.fromkeys((*benchmark_trainers.PARTS, "loader"), step / 4)
    return {"step": step, **parts, "peak": 100.0, "parameters": 1000}


def test_a_steady_drift_cancels() -> None:
    """Each turn is slower than the one before it by the same time; the second trainer takes twice as long."""
    drift = [0.0, 1.0, 2.0, 3.0]  # there: baseline, other; back: other, baseline
    results = {
        "plan": "plan",
        "clock": "CPU time",
        "rounds": 1,
        "threads": 1,
        "surroundings": dict.fromkeys(("machine", "nnunetv2", "torch", "batchgeneratorsv2"), "x"),
        "trainers": [
            {"trainer": "nnUNetTrainer", "passes": None, "turns": [a_turn(8.5 + drift[0]), a_turn(8.5 + drift[3])]},
            {"trainer": "Other", "passes": "lean", "turns": [a_turn(18.5 + drift[1]), a_turn(18.5 + drift[2])]},
        ],
    }
    assert "| `Other` | lean | 20000.0 | 2.00 | 2.00-2.00 |" in benchmark_trainers.table(results)


@pytest.mark.slow
def test_a_prepared_dataset_is_measured_and_its_page_filled(tiny_copy, tmp_path, monkeypatch) -> None:
    dataset = tiny_copy("3d")
    monkeypatch.setenv("nnUNet_ssl_config", "")  # set by the script
    page = tmp_path / "page.md"
    page.write_text("<!-- cpu: written by scripts/benchmark_trainers.py -->\n<!-- cpu: end -->\n")
    arguments = ["-d", str(dataset.id), "-p", dataset.plans_name, "-device", "cpu", "--page", str(page)]
    arguments += ["--rounds", "1", "--steps", "2", "--warm-up", "1", "--trainers", "nnUNetTrainerCPS"]
    benchmark_trainers.main([*arguments, "--output", str(tmp_path / "out")])

    results = json.loads((tmp_path / "out.json").read_text())
    assert [(e["trainer"], e["passes"]) for e in results["trainers"]] == [
        ("nnUNetTrainer", None),
        ("nnUNetTrainerCPS", "paired"),
        ("nnUNetTrainerCPS", "lean"),
    ]
    for entry in results["trainers"]:
        for taken in entry["turns"]:
            assert all(taken[key] > 0 for key in ("step", "loader", "peak", *benchmark_trainers.PARTS)), entry
    single, paired, _ = (entry["turns"][0]["parameters"] for entry in results["trainers"])
    assert paired == 2 * single
    assert benchmark_trainers.table(results) in page.read_text()
