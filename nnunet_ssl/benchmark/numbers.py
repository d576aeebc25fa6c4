"""The numbers of a benchmark: of each run, of each row against another, and over labeled sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.benchmark.protocol import Protocol
from nnunet_ssl.benchmark.runs import Benchmark, Run, Table, epoch_seconds, trainings
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.compare import bootstrap_interval, holm, signed_rank_p
from nnunet_ssl.evaluation.draws import MIN_DRAWS, mean_of_units, mean_over_draws, share_of_gap, t_over_draws
from nnunet_ssl.evaluation.metrics import METRICS
from nnunet_ssl.evaluation.summary import nanmean
from nnunet_ssl.files import read_json
from nnunet_ssl.unlabeled.find import read_dataset_json
from nnunet_ssl.unlabeled.groups import read_groups

Summaries = dict[tuple[str, int], dict[str, Any]]  # of a table's finished runs, by row and seed


def collect(benchmark: Benchmark) -> dict[str, Any]:
    """Everything that the report needs, as it goes into ``results.json``."""
    p = benchmark.protocol
    queue, keys = benchmark.queue(), [METRICS[name].key for name in p.metrics]
    finished = [run for run in queue if benchmark.is_finished(run)]
    if not finished:
        raise UserError(f"no run in {benchmark.home} is finished yet, so there is nothing to report.")
    last = {run.folder: read_summary(benchmark.summary(run, p.epochs), keys) for run in finished}
    _refuse_other_cases(last)
    runs = {run.folder: _result(benchmark, run, last[run.folder]) for run in finished}
    groups = groups_of_cases(benchmark)
    tables = []
    for table in benchmark.tables():
        done = {(run.row.name, run.seed): last[run.folder] for run in table.runs if run.folder in last}
        found = {
            "runs": [runs[run.folder] for run in table.runs if run.folder in runs],
            "differences": list(_differences(p, done, groups)),
            "over_draws": over_draws(p, table, done, groups),
        }
        tables.append({"budget": table.budget.key, "labeled": table.labeled, **found})
    places = {json.dumps(place): place for folder in runs for fold in trainings(folder) for place in _made_on(fold)}
    return {
        "protocol": p.name,
        "unfinished": [run.title for run in queue if run.folder not in last],
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
    """The ``summary.json`` of a run's predictions, as ``nnUNetv2_ssl_evaluate`` wrote it, with metrics of these keys.

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


def _result(benchmark: Benchmark, run: Run, last: dict[str, Any]) -> dict[str, Any]:
    """One run: its numbers at the end and on the way."""
    p = benchmark.protocol
    leading = METRICS[p.metrics[0]].key
    seconds = sum(sum(epoch_seconds(fold).values()) for fold in trainings(run.folder))
    points = {epoch: read_summary(benchmark.summary(run, epoch), [leading]) for epoch in p.curve_epochs}
    return {
        "row": run.row.name,
        "trainer": run.row.trainer,
        "labeled": run.labeled,
        "seed": run.seed,
        "steps": run.steps_before + run.iterations * p.epochs,
        "minutes": seconds / 60 + (run.row.offline or 0),
        "metrics": {METRICS[name].key: _mean(last, METRICS[name].key) for name in p.metrics},
        "groups": {name: values[leading] for name, values in last.get("group_mean", {}).items()},
        "classes": {last["class_names"][label]: values[leading] for label, values in last["mean"].items()},
        "options": last["options"],
        "curve": [
            {"steps": run.steps_before + epoch * run.iterations, leading: _mean(summary, leading)}
            for epoch, summary in points.items()
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
    """Name of a label file -> patient, from the first raw dataset that has a ``groups.json``; empty where none has.

    Raises:
        UserError: the raw datasets are gone, and with them what they say of patients.
    """
    ids = benchmark.ids.values()
    folders = [folder for number in ids for folder in sorted(benchmark.raw.glob(f"Dataset{number:03d}_*"))]
    if not folders:
        raise UserError(
            f"none of this benchmark's datasets ({', '.join(map(str, ids))}) is in {benchmark.raw}, so nobody can tell "
            "whether patients have several cases; restore them, or set nnUNet_raw to where they are."
        )
    for file in (folder / "groups.json" for folder in folders if (folder / "groups.json").is_file()):
        ending = read_dataset_json(str(file.parent))["file_ending"]
        return {case + ending: patient for case, patient in read_groups(str(file)).items()}
    return {}


def _refuse_other_cases(summaries: dict[Path, dict[str, Any]]) -> None:
    """Refuse runs that were not tested on the same cases: they cannot be compared case by case.

    Raises:
        UserError: names the first that differs.
    """
    (first, wanted), *others = ((folder, units_of(summary, {})) for folder, summary in summaries.items())
    for folder, cases in others:
        if odd := sorted({*wanted} ^ {*cases}):
            raise UserError(
                f"{folder} and {first} were not tested on the same cases ({odd[0]} is among those of one alone); "
                "remove the folder whose cases are wrong, and what is of the same name in done, and start again."
            )


def units_of(summary: dict[str, Any], groups: dict[str, str]) -> list[str]:
    """What counts as one when cases are resampled, for each case by name: its patient, or its label file's name."""
    files = [os.path.basename(case["reference_file"]) for case in _by_name(summary)]
    return [groups.get(file, file) for file in files]


def _gains(done: Summaries, row: str, other: str, seeds: Sequence[int], key: str, groups: dict[str, str]) -> np.ndarray:
    """``[seeds, units]``: what a row has of a metric that another has not; NaN where undefined."""
    pairs = [[case_values(done[name, seed], key) for name in (row, other)] for seed in seeds]
    units = units_of(done[row, seeds[0]], groups)
    return np.array([mean_of_units(case_differences(*pair), units) for pair in pairs])


def _differences(p: Protocol, done: Summaries, groups: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Each row but the first against the one it is compared with, in every metric."""
    for row in p.rows:
        other = p.against(row)
        seeds = [seed for seed in p.seeds if (row.name, seed) in done and (other.name, seed) in done]
        if row is other or not seeds:
            continue
        for key in (METRICS[name].key for name in p.metrics):
            gains = _gains(done, row.name, other.name, seeds, key, groups)
            by_unit = np.array([nanmean(of_seeds) for of_seeds in gains.T])
            by_unit = by_unit[~np.isnan(by_unit)]
            low, high = bootstrap_interval(by_unit)
            yield {
                "row": row.name,
                "against": other.name,
                "metric": key,
                "seeds": {str(seed): nanmean(values) for seed, values in zip(seeds, gains, strict=True)},
                "mean": nanmean(by_unit),
                "low": low,
                "high": high,
                "p": signed_rank_p(by_unit),
                "cases": len(by_unit),
            }


def over_draws(p: Protocol, table: Table, done: Summaries, groups: dict[str, str]) -> dict[str, Any] | None:
    """What the rows gain over labeled sets, in the leading metric; None where there are not enough of these.

    With all cases labeled there is one set, and seeds differ by chance alone.

    Returns:
        ``draws``, ``units`` (how many), ``of_patients`` and ``rows``: of each row the difference to the one that it is
        compared with, and its share of the protocol's gap (NaN if it has none).
    """
    key = METRICS[p.metrics[0]].key
    # the same labeled sets for all rows that are there at all
    names = {name for name, _ in done}
    seeds = [seed for seed in p.seeds if all((name, seed) in done for name in names)]
    if not p.data.order_by_seed or table.labeled == "all" or len(seeds) < MIN_DRAWS:
        return None
    units = units_of(next(iter(done.values())), groups)
    ends = {p.gap.lower, p.gap.upper} if p.gap else set()
    found = []
    for row in p.rows:
        other = p.against(row)
        if row is other or not {row.name, other.name} <= names:
            continue
        values = _gains(done, row.name, other.name, seeds, key, groups)
        share = (float("nan"),) * 3
        if ends and ends <= names - {row.name}:
            of_row, of_gap = (_gains(done, name, p.gap.lower, seeds, key, groups) for name in (row.name, p.gap.upper))
            share = share_of_gap(of_row, of_gap)
        fields = ("mean", "low", "high", "t_low", "t_high", "p", "share", "share_low", "share_high")
        numbers = (*mean_over_draws(values), *t_over_draws(values), *share)
        found.append({"row": row.name, "against": other.name, **dict(zip(fields, numbers, strict=True))})
    for line, p_holm in zip(found, holm([line["p"] for line in found]), strict=True):
        line["p_holm"] = p_holm
    about = {"draws": len(seeds), "units": len(set(units)), "of_patients": bool(groups)}
    return about | {"rows": found} if found else None


def case_differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``[cases]``: mean over the classes that are defined in both ``[cases, classes]`` of one - other."""
    return np.array([nanmean(row) for row in one - other])
