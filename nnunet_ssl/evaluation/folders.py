"""Evaluate folders of predicted label maps against the folder of the truth.

Each case is read once for all methods. Nothing is left out in silence: a case that is missing somewhere, cannot be
read or lies on another grid is named, and then there is no result at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.classes import Dataset, files_in
from nnunet_ssl.evaluation.label_maps import Grid, grid_difference, grid_of, read_label_map
from nnunet_ssl.evaluation.metrics import Label, Options, case_metrics
from nnunet_ssl.pools import all_outcomes
from nnunet_ssl.volumes import VolumeError, unreadable

MAX_PROBLEMS = 50  # named in one message


@dataclass(frozen=True)
class Case:
    """The files of a case, and once it is measured the metrics: method -> class -> key -> value."""

    name: str
    reference: str
    predictions: dict[str, str]
    metrics: dict[str, dict[Label, dict[str, float]]] | None = None


def evaluate_folders(
    reference: str,
    predictions: Mapping[str, str],
    dataset: Dataset,
    options: Options,
    num_processes: int = 1,
    chill: bool = False,
) -> list[Case]:
    """Measure every case of every method.

    Args:
        reference: folder of the true label maps.
        predictions: method -> folder of its label maps, named as the true ones.
        dataset, options: classes and files, and what is measured.
        num_processes: at most; small sets are done in this process.
        chill: evaluate the cases that are in every folder, and print which are not.

    Returns:
        The cases with their metrics, by name.

    Raises:
        UserError: names every case with which something is wrong.
    """
    cases, missing = find_cases(reference, predictions, dataset.file_ending)
    if chill:
        for problem in missing:
            print(f"Left out: {problem}", flush=True)
        missing = []
    problems = [*missing, *(problem for case in cases for problem in _header_problems(case, dataset.reader))]
    _refuse(problems, " --chill evaluates the cases that every folder has." if missing else "")
    if not cases:
        raise UserError(
            f"no {dataset.file_ending} file of {reference} is in every prediction folder "
            f"({', '.join(predictions.values())}). Label maps must have the same names as the true ones."
        )
    jobs = [(case, dataset, options) for case in cases]
    found = all_outcomes(evaluate_case, jobs, num_processes, "Evaluating")
    _refuse(sorted(problem for outcome in found if isinstance(outcome, list) for problem in outcome))
    return sorted(found, key=lambda case: case.name)


def find_cases(reference: str, predictions: Mapping[str, str], ending: str) -> tuple[list[Case], list[str]]:
    """Match the files of the folders by name.

    Returns:
        The cases that are in every folder, and sentences that name the files that are in one and not in another.
    """
    true_files = set(files_in(reference, ending))
    folders = {method: set(files_in(folder, ending)) for method, folder in predictions.items()}
    missing = []
    for method, files in folders.items():
        missing += [f"{os.path.join(predictions[method], file)} is missing" for file in sorted(true_files - files)]
        without = [os.path.join(reference, file) for file in sorted(files - true_files)]
        missing += [f"{file} is missing, but {method} has a prediction of it" for file in without]
    cases = []
    for file in sorted(true_files.intersection(*folders.values())):
        own = {method: os.path.join(folder, file) for method, folder in predictions.items()}
        cases.append(Case(file.removesuffix(ending), os.path.join(reference, file), own))
    return cases, missing


def _refuse(problems: Sequence[str], hint: str = "") -> None:
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        listed = "\n  ".join([*problems[:MAX_PROBLEMS], *more])
        raise UserError(f"nothing was evaluated, because there are {len(problems)} problem(s).{hint}\n  {listed}")


def evaluate_case(case: Case, dataset: Dataset, options: Options) -> Case | list[str]:
    """Read and measure a case: gives the case with its metrics, or sentences that say what is wrong with its files.

    Raising would break the pool.
    """
    reader = dataset.reader()

    def read(file: str) -> tuple[np.ndarray, Grid]:
        labels, properties = read_label_map(file, reader)
        dataset.check_labels(labels, file)
        return labels, grid_of(labels, properties)

    try:
        truth, grid = read(case.reference)
    except VolumeError as error:
        return [str(error)]
    metrics, problems = {}, []
    for method, file in case.predictions.items():
        try:
            prediction, own = read(file)
            if difference := grid_difference(own, grid):
                raise VolumeError(f"{file} {difference}")
            metrics[method] = case_metrics(
                truth, prediction, dataset.classes, grid.spacing, options, dataset.ignore_label
            )
        except VolumeError as error:
            problems.append(str(error))
        except Exception as error:
            problems.append(f"{file} cannot be evaluated ({type(error).__name__}: {error})")
    return problems or Case(case.name, case.reference, case.predictions, metrics)


def _header_problems(case: Case, reader: type) -> list[str]:
    """Compare what the headers say, where that is possible without reading the voxels: soon, and for all cases."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    if reader is not SimpleITKIO:  # others may turn the axes
        return []
    problems, grids = [], {}
    for file in (case.reference, *case.predictions.values()):
        try:
            grids[file] = _grid_of_header(file)
        except RuntimeError as error:
            problems.append(str(unreadable(file, error)))
    if truth := grids.pop(case.reference, None):
        found = {file: grid_difference(grid, truth) for file, grid in grids.items()}
        problems += [f"{file} {difference}" for file, difference in found.items() if difference]
    return problems


def _grid_of_header(file: str) -> Grid:
    import SimpleITK as sitk

    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    # from SimpleITK's axis order to that of arrays
    return Grid(header.GetSize()[::-1], header.GetSpacing()[::-1], header.GetOrigin(), header.GetDirection())
