"""Predictions of the cases, by nnU-Net's predictor, which are kept as long as they are current."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.runs import FINAL, TrainedRun, load_predictor, reason
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.files import read_json, same_content, stamp, write_json
from nnunet_ssl.unlabeled.stamps import image_stamps, kept_stamps, same_images

RECORD = "made_from.json"
WORKERS_PAY_FROM = 2**26  # bytes of images; starting nnU-Net's workers takes half a minute
MAX_WORKERS = 3  # of preprocessing, and of export: nnUNetv2_predict's own; each holds a whole case in memory


def with_predictions(
    runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions
) -> list[TrainedRun]:
    """The runs, each with its ``predicted`` label map of every case; what is not there is predicted now.

    Of validation cases nnU-Net's own ``validation`` folder is taken, if this model and these settings made it.

    Raises:
        UserError: a case cannot be predicted.
    """
    found = []
    for run in runs:
        if run.predicted is None and _has_validated(run, cases, options):
            run = replace(run, predicted=run.fold_folder / "validation", how="nnU-Net's validation, with mirroring")
        elif run.predicted is None:
            how = f"predicted for the figures, {'with' if options.tta else 'without'} mirroring"
            run = replace(run, predicted=predict(run, cases, out, options), how=how)
        found.append(run)
    return found


def _has_validated(run: TrainedRun, cases: Sequence[Case], options: FigureOptions) -> bool:
    """Whether nnU-Net's validation of these cases is what the final checkpoint predicts with mirroring."""
    if run.checkpoint != FINAL or not options.tta or run.folder.parent.name != options.dataset:
        return False
    trained = run.checkpoint_file.stat().st_mtime_ns
    files = [run.fold_folder / "validation" / f"{case.name}{options.file_ending}" for case in cases]
    return all(case.kind != "test" for case in cases) and all(
        file.is_file() and file.stat().st_mtime_ns >= trained for file in files
    )


def with_given_predictions(
    runs: Sequence[TrainedRun], folders: Sequence[Path], cases: Sequence[Case], options: FigureOptions
) -> list[TrainedRun]:
    """The runs with the folders of ``-pred``.

    Raises:
        UserError: too few or too many folders, or one without one of the cases.
    """
    if len(folders) != len(runs):
        raise UserError(f"-pred gives {len(folders)} folder(s) for {len(runs)} model(s). Give one for each.")
    for folder in folders:
        for case in cases:
            if not (file := folder / f"{case.name}{options.file_ending}").is_file():
                raise UserError(f"{file} does not exist: predict the case, or leave out -pred.")
    return [replace(run, predicted=folder, how="given with -pred") for run, folder in zip(runs, folders, strict=True)]


def models_in_words(runs: Iterable[TrainedRun]) -> str:
    """For captions: where each run's predictions and weights lie, and how the predictions were made."""
    return "\n".join(f"- {run.name}: `{run.predicted}` ({run.how}), `{run.checkpoint_file}`" for run in runs)


def prediction_folder(run: TrainedRun, out: Path) -> Path:
    """Where predictions made for the figures are kept."""
    return out / "predictions" / (run.key or run.trainer)


def predict(run: TrainedRun, cases: Sequence[Case], out: Path, options: FigureOptions) -> Path:
    """Predict label maps with nnU-Net's own predictor, those that are not there yet.

    Returns:
        Their folder. A case is there whole or not at all.

    Raises:
        UserError: a case cannot be predicted; those before it are kept.
    """
    folder, ending = current_folder(run, cases, out, options), options.file_ending
    missing = [case for case in cases if not (folder / f"{case.name}{ending}").is_file()]
    if not missing:
        return folder
    predictor = load_predictor(run, options.device, options.tta)
    size = sum(file.stat().st_size for case in missing for file in case.images)
    workers = min(options.num_processes, MAX_WORKERS) if size > WORKERS_PAY_FROM else 1
    at_a_time = 1 if workers == 1 else 2 * workers  # a process that is killed loses no more
    building = folder / "unfinished"
    shutil.rmtree(building, ignore_errors=True)  # left by a killed run
    building.mkdir()
    try:
        for start in tqdm(range(0, len(missing), at_a_time), f"Predicting, {run.name}"):
            batch = missing[start : start + at_a_time]
            files = [list(map(str, case.images)) for case in batch], [str(building / case.name) for case in batch]
            with predicting(run, batch):
                if workers == 1:
                    predictor.predict_from_files_sequential(*files)
                else:
                    predictor.predict_from_files(
                        *files, num_processes_preprocessing=workers, num_processes_segmentation_export=workers
                    )
            for case in batch:
                os.replace(building / f"{case.name}{ending}", folder / f"{case.name}{ending}")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


@contextlib.contextmanager
def predicting(run: TrainedRun, cases: Sequence[Case]) -> Iterator[None]:
    """Around nnU-Net's predictor: says what cannot be predicted, and keeps several lines a case from the screen.

    Raises:
        UserError: for any exception within.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        raise UserError(
            f"{run.name} cannot predict {', '.join(case.name for case in cases)} ({reason(error)}). "
            f"Check {cases[0].images[0].parent}, and whether memory suffices."
        ) from error


def current_folder(run: TrainedRun, cases: Sequence[Case], out: Path, options: FigureOptions) -> Path:
    """The folder for what a run predicts, without what it would not predict now.

    That is what another checkpoint, other images or the other setting of mirroring gave.

    Raises:
        UserError: an image cannot be read.
    """
    folder = prediction_folder(run, out)
    stored = _read_record(folder / RECORD)
    checkpoint = stamp(run.checkpoint_file, stored.get("checkpoint"))
    images = image_stamps({case.name: list(map(str, case.images)) for case in cases}, stored.get("images"))
    is_same = stored and stored["mirroring"] == options.tta and same_content(stored["checkpoint"], checkpoint)
    kept = stored["images"] if is_same else {}
    for case, files in images.items():
        if case not in kept or not same_images(kept[case], files):
            for ending in (options.file_ending, ".npz"):
                (folder / f"{case}{ending}").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"checkpoint": checkpoint, "mirroring": options.tta, "images": {**kept, **images}}
    if record != stored:  # what is complete may lie where nothing can be written
        write_json(folder / RECORD, record)
    return folder


def _read_record(file: Path) -> dict[str, Any]:
    """Empty where there is none, or none that this module can have written."""
    try:
        stored = read_json(file, "", keys={"checkpoint": list, "mirroring": bool, "images": dict})
        _size, _time, _digest = stored["checkpoint"]
        return stored | {"images": kept_stamps(stored["images"], str(file))}
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return {}
