"""The benchmark of steps: each trainer beside nnUNetTrainer, and their table."""

from __future__ import annotations

import json

import benchmark_trainers
import pytest


def test_ratios_are_those_of_pairs_of_steps_not_of_medians() -> None:
    """The machine is slower each time: the ratios of each turn stay, and the table has their median and range."""

    def a_turn(step: float, ratio: float) -> dict[str, float]:
        parts = dict.fromkeys((*benchmark_trainers.PARTS, "loader"), step / 4)
        return {"step": step, "ratio": ratio, **parts, "peak": 100.0 * ratio, "parameters": 1000}

    results = {
        "plan": "plan",
        "clock": "CPU time",
        "rounds": 3,
        "threads": 1,
        "surroundings": dict.fromkeys(("machine", "nnunetv2", "torch", "batchgeneratorsv2"), "x"),
        "trainers": [
            {"trainer": "nnUNetTrainer", "passes": None, "turns": [a_turn(s, 1.0) for s in (8.0, 9.0, 10.0)]},
            {
                "trainer": "Other",
                "passes": "lean",
                "turns": [a_turn(*x) for x in ((20.0, 2.1), (30.0, 2.0), (40.0, 1.9))],
            },
        ],
    }
    table = benchmark_trainers.table(results)
    assert "| `Other` | lean | 30000.0 | 2.00 | 1.90-2.10 |" in table
    assert "| 200 | 2.00 | 1,000 | 1.000 |" in table


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
            assert all(taken[key] > 0 for key in ("step", "ratio", "loader", "peak", *benchmark_trainers.PARTS)), entry
    single, paired, _ = (entry["turns"][0]["parameters"] for entry in results["trainers"])
    assert paired == 2 * single
    assert benchmark_trainers.table(results) in page.read_text()
