"""The numbers of a benchmark: of each run, of each row against another, and over labeled sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.benchmark.runs import Benchmark, Run, epoch_seconds, trainings
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.compare import bootstrap_interval, holm, signed_rank_p
from nnunet_ssl.evaluation.draws import MIN_DRAWS, mean_of_units, mean_over_draws, share_of_gap, t_over_draws
from nnunet_ssl.evaluation.metrics import METRICS
from nnunet_ssl.evaluation.summary import nanmean
from nnunet_ssl.files import read_json


def collect(benchmark: Benchmark) -> dict[str, Any]:
    """Everything that the report needs, as it goes into ``results.json``."""
    p = benchmark.protocol
    runs = {run.folder: _result(benchmark, run) for run in benchmark.queue() if benchmark.is_finished(run)}
    if not runs:
        raise UserError(f"no run in {benchmark.home} is finished yet, so there is nothing to report.")
    tables = [
        {
            "budget": table.budget.key,
            "labeled": table.labeled,
            "runs": [runs[run.folder] for run in table.runs if run.folder in runs],
            "differences": list(_differences(benchmark, table.runs)),
            "over_draws": over_draws(benchmark, table.runs),
        }
        for table in benchmark.tables()
    ]
    folds = [fold for folder in runs for fold in trainings(folder)]
    places = {json.dumps(place): place for fold in folds for place in _made_on(fold)}
    return {
        "protocol": p.name,
        "unfinished": [run.title for run in benchmark.queue() if run.folder not in runs],
        "seconds_per_step": benchmark.seconds_per_step(),
        "surroundings": list(places.values()),
        "tables": tables,
    }


def _made_on(fold: Path) -> Iterator[dict[str, str]]:
    """The machines and versions that a training ran on, in turn: it may have gone on elsewhere."""
    file, remedy = fold / "ssl_settings.json", "Restore it, or remove the run's folder and start the benchmark again."
    for place in read_json(file, remedy, keys={"made_on": list})["made_on"]:
        if not isinstance(place, dict) or not {"device", "machine"} <= set(place):
            raise UserError(f"{file} lists {place!r}, which does not describe a machine. {remedy}")
        yield place


def read_summary(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What ``nnUNetv2_ssl_evaluate`` wrote of a run's predictions.

    Args:
        file: ``summary.json``.
        keys: of the metrics that it must have.

    Raises:
        UserError: it is damaged, or lacks a metric.
    """
    remedy = "Evaluate these predictions again, with the command that is recorded in the folder done."
    kinds = {"mean": dict, "metric_per_case": list, "class_names": dict, "options": dict}
    summary = read_json(file, remedy, keys=kinds)
    try:
        for values in [*summary["mean"].values(), *summary.get("group_mean", {}).values()]:
            _ = [float(values[key]) for key in keys]
        for case in summary["metric_per_case"]:
            _ = os.fspath(case["reference_file"]), [float(v[key]) for v in case["metrics"].values() for key in keys]
        _ = [os.fspath(summary["class_names"][label]) for label in summary["mean"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not as nnUNetv2_ssl_evaluate writes it ({error!r}). {remedy}") from error
    return summary


def _result(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """One run: its numbers at the end and on the way."""
    p = benchmark.protocol
    leading = METRICS[p.metrics[0]].key
    keys = [METRICS[name].key for name in p.metrics]
    last = read_summary(benchmark.summary(run, p.epochs), keys)
    points = [(epoch, read_summary(benchmark.summary(run, epoch), keys[:1])) for epoch in p.curve_epochs]
    return {
        "row": run.row.name,
        "trainer": run.row.trainer,
        "labeled": run.labeled,
        "seed": run.seed,
        "steps": run.steps_before + run.iterations * p.epochs,
        "minutes": sum(sum(epoch_seconds(fold).values()) for fold in trainings(run.folder)) / 60
        + (run.row.offline or 0),
        "metrics": {key: _mean(last, key) for key in keys},
        "groups": {name: values[leading] for name, values in last.get("group_mean", {}).items()},
        "classes": {last["class_names"][label]: values[leading] for label, values in last["mean"].items()},
        "options": last["options"],
        "curve": [
            {"steps": run.steps_before + epoch * run.iterations, leading: _mean(summary, leading)}
            for epoch, summary in points
        ],
    }


def _mean(summary: dict[str, Any], key: str) -> float:
    return nanmean(values[key] for values in summary["mean"].values())


def _by_name(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(summary["metric_per_case"], key=lambda case: os.path.basename(case["reference_file"]))


def case_values(summary: dict[str, Any], key: str) -> np.ndarray:
    """``[cases, classes]`` of a metric, the cases by name; NaN where undefined."""
    return np.array([[values[key] for values in case["metrics"].values()] for case in _by_name(summary)], float)


def groups_of_cases(benchmark: Benchmark) -> dict[str, str]:
    """Case -> patient, from the first raw dataset that has a ``groups.json``; empty where none has."""
    for number in benchmark.ids.values():
        for file in sorted(benchmark.raw.glob(f"Dataset{number:03d}_*/groups.json")):
            groups = read_json(file, "Make the dataset again.")
            if wrong := [case for case, patient in groups.items() if not isinstance(patient, str)]:
                raise UserError(f"{file} has {groups[wrong[0]]!r} as the patient of {wrong[0]}; write its name.")
            return groups
    return {}


def units_of(benchmark: Benchmark, summary: dict[str, Any]) -> list[str]:
    """What counts as one when cases are resampled, for each case by name: its patient, or the case itself."""
    groups = groups_of_cases(benchmark)
    cases = [os.path.basename(case["reference_file"]).split(".")[0] for case in _by_name(summary)]
    if groups and (without := [case for case in cases if case not in groups]):
        raise UserError(
            f"groups.json of {benchmark.protocol.name}'s datasets names no patient of {without[0]}; add it."
        )
    return [groups.get(case, case) for case in cases]


def _differences(benchmark: Benchmark, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Each row but the first against the one it is compared with, in every metric."""
    p = benchmark.protocol
    keys = [METRICS[name].key for name in p.metrics]
    done = {(run.row.name, run.seed): run for run in runs if benchmark.is_finished(run)}
    for row in p.rows:
        other = p.against(row)
        seeds = [seed for seed in p.seeds if (row.name, seed) in done and (other.name, seed) in done]
        if row is other or not seeds:
            continue
        pairs = [
            tuple(read_summary(benchmark.summary(done[name, seed], p.epochs), keys) for name in (row.name, other.name))
            for seed in seeds
        ]
        units = units_of(benchmark, pairs[0][0])
        for metric in (METRICS[name] for name in p.metrics):
            by_seed = [case_differences(*(case_values(summary, metric.key) for summary in pair)) for pair in pairs]
            by_case = np.array([nanmean(values) for values in np.stack(by_seed, axis=1)])
            by_case = mean_of_units(by_case, units)
            low, high = bootstrap_interval(by_case)
            yield {
                "row": row.name,
                "against": other.name,
                "metric": metric.key,
                "seeds": {str(seed): nanmean(values) for seed, values in zip(seeds, by_seed, strict=True)},
                "mean": nanmean(by_case),
                "low": low,
                "high": high,
                "p": signed_rank_p(by_case),
                "cases": len(by_case),
            }


def over_draws(benchmark: Benchmark, runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the rows gain over labeled sets, in the leading metric; None if there are too few of these.

    Returns:
        ``draws``, ``units`` (how many), ``of_patients`` and ``rows``: of each row the difference to the one that it is
        compared with, and its share of the protocol's gap (NaN if it has none).
    """
    p = benchmark.protocol
    key = METRICS[p.metrics[0]].key
    done = {(run.row.name, run.seed): run for run in runs if benchmark.is_finished(run)}
    # the same labeled sets for all rows that are there at all
    names = [row.name for row in p.rows if any(name == row.name for name, _ in done)]
    seeds = [seed for seed in p.seeds if all((name, seed) in done for name in names)]
    if not p.data.order_by_seed or len(seeds) < MIN_DRAWS:
        return None
    summaries = {
        (name, seed): read_summary(benchmark.summary(done[name, seed], p.epochs), [key])
        for name in names
        for seed in seeds
    }
    units = units_of(benchmark, summaries[names[0], seeds[0]])

    def gain(name: str, other: str) -> np.ndarray:
        pairs = [[case_values(summaries[one, seed], key) for one in (name, other)] for seed in seeds]
        return np.array([case_differences(*pair) for pair in pairs])

    found = []
    for row in p.rows:
        other = p.against(row)
        if row is other or not {row.name, other.name} <= set(names):
            continue
        values = gain(row.name, other.name)
        share = (float("nan"),) * 3
        if p.gap and {p.gap.lower, p.gap.upper} <= set(names) and row.name not in (p.gap.lower, p.gap.upper):
            share = share_of_gap(gain(row.name, p.gap.lower), gain(p.gap.upper, p.gap.lower), units)
        found.append(
            {
                "row": row.name,
                "against": other.name,
                **dict(zip(("mean", "low", "high"), mean_over_draws(values, units), strict=True)),
                **dict(zip(("t_low", "t_high", "p"), t_over_draws(values), strict=True)),
                **dict(zip(("share", "share_low", "share_high"), share, strict=True)),
            }
        )
    for line, p_holm in zip(found, holm([line["p"] for line in found]), strict=True):
        line["p_holm"] = p_holm
    of_patients = any(unit in set(groups_of_cases(benchmark).values()) for unit in units)
    return {"draws": len(seeds), "units": len(set(units)), "of_patients": of_patients, "rows": found} if found else None


def case_differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[cases]``: mean over the classes that are defined in both ``[cases, classes]`` of one - other."""
    return np.array([nanmean(row) for row in one - other])
