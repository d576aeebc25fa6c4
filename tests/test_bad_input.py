"""Every row of the tables in docs/bad-input.md: one message that names culprit and remedy, code 1, no loss."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import Folders, TinyDataset, environment, write_images

from nnunet_ssl.commands import preprocess, split
from nnunet_ssl.locks import take

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "bad-input.md"


class Row(NamedTuple):
    """``spoil`` makes the input bad and gives back further arguments of the command."""

    spoil: Callable[[TinyDataset], list[Any] | None]
    kind: str = "3d"
    trainer: str = "nnUNetTrainerCPS"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


# ------------------------------------------------------------------ images without labels


def image(dataset: TinyDataset, channel: int = 0) -> Path:
    """A channel file of the second unlabeled case."""
    case = dataset.cases("imagesUn")[1]
    return dataset.raw / "imagesUn" / f"{case}_{channel:04d}{dataset.recipe.file_ending}"


def empty(dataset: TinyDataset) -> None:
    for file in (dataset.raw / "imagesUn").iterdir():
        file.unlink()


def truncate(dataset: TinyDataset) -> None:
    file = image(dataset)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 10])


def with_voxels(dataset: TinyDataset, values: list[float]) -> None:
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(image(dataset)))).astype(np.float32)
    array[3, 4, 5 : 5 + len(values)] = values
    sitk.WriteImage(sitk.GetImageFromArray(array), str(image(dataset)))


def uncompressed(dataset: TinyDataset) -> None:
    image(dataset).write_bytes(gzip.decompress(image(dataset).read_bytes()))


def with_bad_header(dataset: TinyDataset) -> None:
    content = bytearray(gzip.decompress(image(dataset).read_bytes()))
    content[108:112] = bytes(4)  # vox_offset
    image(dataset).write_bytes(gzip.compress(bytes(content)))


def as_2d(dataset: TinyDataset) -> None:
    sitk.WriteImage(sitk.ReadImage(str(image(dataset)))[:, :, 3], str(image(dataset)))


def crop_one_channel(dataset: TinyDataset) -> None:
    sitk.WriteImage(sitk.ReadImage(str(image(dataset, 1)))[:, :, 3:], str(image(dataset, 1)))


def nothing_to_take(dataset: TinyDataset) -> None:
    shutil.rmtree(dataset.raw / "imagesUn")
    shutil.rmtree(dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}_unlabeled")


def odd_name(dataset: TinyDataset) -> None:
    os.rename(image(dataset), os.path.join(os.fsencode(image(dataset).parent), b"un_\xe9_0000.nii.gz"))


def broken_link(dataset: TinyDataset) -> None:
    file = image(dataset)
    file.unlink()
    file.symlink_to("elsewhere.nii.gz")


def labeled_image(dataset: TinyDataset, put: Callable[[Path, Path], Any]) -> None:
    file = image(dataset)
    file.unlink()
    put(dataset.raw / "imagesTr" / f"{dataset.cases('imagesTr')[0]}_0000.nii.gz", file)


def other_identifier(dataset: TinyDataset) -> None:
    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["data_identifier"] = "../../x"
    dataset.plans_file.write_text(json.dumps(plans))


def named_as(dataset: TinyDataset, case: str) -> None:
    image(dataset).rename(image(dataset).with_name(f"{case}_0000.nii.gz"))


def named_as_validation_case(dataset: TinyDataset) -> None:
    *train, val = dataset.cases("imagesTr")
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps([{"train": train, "val": [val]}]))
    named_as(dataset, val)


PREPROCESS = {
    "no `imagesUn`": Row(nothing_to_take),
    "empty `imagesUn`": Row(empty),
    "a channel file too many": Row(lambda d: shutil.copy(image(d), image(d, 1)) and None),
    "too few channels in the file": Row(lambda d: image(d, 1).unlink(), "multichannel"),
    "wrong file ending": Row(lambda d: image(d).rename(str(image(d)).replace(".nii.gz", ".nrrd")) and None),
    "name without channel": Row(lambda d: image(d).rename(str(image(d)).replace("_0000", "")) and None),
    "truncated NIfTI": Row(truncate),
    "not compressed, but named so": Row(uncompressed),
    "damaged NIfTI header": Row(with_bad_header),
    "not an image": Row(lambda d: image(d).write_text("hello") and None),
    "NaN voxels": Row(lambda d: with_voxels(d, [np.nan])),
    "infinite voxels": Row(lambda d: with_voxels(d, [np.inf, -np.inf])),
    "voxels too large for float32": Row(lambda d: with_voxels(d, [3e38, -3e38])),
    "a 2D image among 3D": Row(as_2d),
    "channels of different shape": Row(crop_one_channel, "multichannel"),
    "the name of a labeled case": Row(lambda d: named_as(d, d.cases("imagesTr")[0])),
    "the name of a validation case": Row(named_as_validation_case),
    "a name that is not UTF-8": Row(odd_name),
    "a link that leads nowhere": Row(broken_link),
    "a link to a labeled image": Row(lambda d: labeled_image(d, os.symlink)),
    "a copy of a labeled image": Row(lambda d: labeled_image(d, shutil.copyfile)),
    "plans that lead out of the dataset's folder": Row(other_identifier),
    "plans that are not JSON": Row(lambda d: d.plans_file.write_text("{") and None),
    "JSON that is not plans": Row(lambda d: d.plans_file.write_text('{"image_reader_writer": "SimpleITKIO"}') and None),
    "no such dataset": Row(lambda d: ["-d", 950]),
    "no such plans": Row(lambda d: ["-p", "Missing"]),
    "no such configuration": Row(lambda d: ["-c", "3d_lowres"]),
}


# ------------------------------------------------------------------ splitting


def a_list(dataset: TinyDataset, name: str, *cases: str) -> Path:
    file = dataset.folders.raw.parent / name
    file.write_text("\n".join(cases))
    return file


def two_lists(dataset: TinyDataset) -> list[Any]:
    one, two, *_ = dataset.cases("imagesTr")
    return ["--labeled", a_list(dataset, "labeled.txt", one, two), "--val", a_list(dataset, "val.txt", two)]


def rewrite(tiny: TinyDataset, **changes: Any) -> None:
    (tiny.raw / "dataset.json").write_text(json.dumps({**tiny.dataset_json, **changes}))


def broken_labeled_link(dataset: TinyDataset) -> None:
    file = dataset.raw / "imagesTr" / f"{dataset.cases('imagesTr')[0]}_0000.nii.gz"
    file.unlink()
    file.symlink_to("nowhere")


SPLIT = {
    "a list names a missing case": Row(
        lambda d: ["--labeled", a_list(d, "labeled.txt", d.cases("imagesTr")[0], "nobody")]
    ),
    "a list names a case twice": Row(lambda d: ["--val", a_list(d, "val.txt", *(d.cases("imagesTr")[:1] * 2))]),
    "two lists name one case": Row(two_lists),
    "the dataset id exists": Row(lambda d: ["-o", d.id]),
    "more cases than there are": Row(lambda d: ["--labeled", 4, "--val", 2]),
    "not a number": Row(lambda d: ["--labeled", "five"]),
    "a fraction outside 0 to 1": Row(lambda d: ["--labeled", "1.5"]),
    "a case name that leads elsewhere": Row(
        lambda d: rewrite(d, dataset={"/elsewhere": {"images": ["imagesTr/tr_00_0000.nii.gz"], "label": "x"}})
    ),
    "an empty `file_ending`": Row(lambda d: rewrite(d, file_ending="")),
    "an image that is a broken link": Row(broken_labeled_link),
    "no labeled dataset": Row(lambda d: ["-d", 950]),
}


# ------------------------------------------------------------------ training


def settings(dataset: TinyDataset, **values: Any) -> list[Any]:
    file = dataset.folders.raw.parent / "settings.json"
    file.write_text(json.dumps(values))
    return []


def cascade(dataset: TinyDataset) -> list[Any]:
    plans = dataset.plans
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    dataset.plans_file.write_text(json.dumps(plans))
    return ["3d_cascade_fullres"]


def three_cases(dataset: TinyDataset) -> None:
    (dataset.preprocessed / "splits_final.json").unlink(missing_ok=True)
    for case in dataset.cases("imagesTr")[3:]:
        for file in (dataset.preprocessed / f"{dataset.plans_name}_{dataset.configuration}").glob(f"{case}*"):
            file.unlink()


def fold(dataset: TinyDataset, train: list[str], val: list[str]) -> None:
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps([{"train": train, "val": val}]))


def large_image(dataset: TinyDataset) -> list[Any]:
    """More than the limit that the child of this row sets itself."""
    rng = np.random.default_rng(0)
    large = rng.normal(100, 20, (1, 60, 60, 60)).astype(np.float32)
    write_images(dataset.recipe, dataset.raw / "imagesUn", "z_large", large)
    return []


def shows_nothing(dataset: TinyDataset) -> None:
    for case in dataset.cases("imagesUn"):
        write_images(dataset.recipe, dataset.raw / "imagesUn", case, np.full((1, *dataset.recipe.shape), 7, np.float32))


def copies_of_tests(dataset: TinyDataset) -> None:
    shutil.rmtree(dataset.raw / "imagesUn")
    shutil.copytree(dataset.raw / "imagesTs", dataset.raw / "imagesUn")


HELD = []  # locks that another process than the training's has


def work_in_its_folder(dataset: TinyDataset) -> list[Any]:
    fold = dataset.folders.results / dataset.name / f"nnUNetTrainerCPS__nnUNetPlans__{dataset.configuration}" / "fold_0"
    HELD.append(take(fold / ".lock", "busy"))
    return []


TRAIN = {
    "no `imagesUn` at training": Row(lambda d: shutil.rmtree(d.raw / "imagesUn")),
    "unknown setting": Row(lambda d: settings(d, cps_wieght=0.5)),
    "ill-typed setting": Row(lambda d: settings(d, cps_weight="much")),
    "setting out of range": Row(lambda d: settings(d, shta_conf_threshold=30), trainer="nnUNetTrainerSHTA_CPS"),
    "NaN as a setting": Row(lambda d: settings(d, cps_weight=float("nan"))),
    "`keep_epochs` beyond the last epoch": Row(lambda d: settings(d, keep_epochs=[1, 1001])),
    "`_0epochs`": Row(lambda d: [], trainer="nnUNetTrainerCPS_0epochs"),
    "cascade configuration": Row(cascade),
    "region-based labels with GA-CPS, MagicNet, SASNet, SS-Net, DHC, SKCDF or SHTA": Row(
        lambda d: [], "regions", "nnUNetTrainerSHTA_CPS"
    ),
    "three labeled cases, and fold 0": Row(three_cases),
    "`splits_final.json` names a missing case": Row(lambda d: fold(d, ["tr_00", "nobody"], ["tr_01"])),
    "a fold without validation cases": Row(lambda d: fold(d, ["tr_00"], [])),
    "disk full while preparing": Row(large_image),
    "another training of the same fold": Row(work_in_its_folder),
    "images that do not register": Row(shows_nothing, trainer="nnUNetTrainerWarps"),
    "`imagesUn` with test images only": Row(copies_of_tests, trainer="nnUNetTrainerWarps"),
    "a patient that is not a string": Row(
        lambda d: (d.raw / "groups.json").write_text('{"tr_00": 3}') and None, trainer="nnUNetTrainerWarps"
    ),
    "damaged checkpoint at `--c`": Row(lambda d: [d.configuration, "--c"]),  # see ``trainings``
}

# ------------------------------------------------------------------ not refused


def new_spacing(dataset: TinyDataset) -> None:
    plans = dataset.plans
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    dataset.plans_file.write_text(json.dumps(plans))


REDONE = {
    "plans changed after preparing": Row(new_spacing),
    "`imagesUn` gone, all of it prepared": Row(lambda d: shutil.rmtree(d.raw / "imagesUn")),
}


# ------------------------------------------------------------------ the test


# what the message names, and a word of the remedy, which is on the page too
SAID = {
    "no `imagesUn`": ("imagesUn", "Put"),
    "empty `imagesUn`": ("imagesUn", "Put"),
    "a channel file too many": ("_0001", "remove"),
    "too few channels in the file": ("_0000.nii.gz", "channel files"),
    "wrong file ending": (".nrrd", "convert"),
    "name without channel": (".nii.gz", "Rename"),
    "truncated NIfTI": ("_0000.nii.gz", "replace"),
    "not compressed, but named so": ("_0000.nii.gz", "replace"),
    "damaged NIfTI header": ("_0000.nii.gz", "replace"),
    "not an image": ("_0000.nii.gz", "replace"),
    "NaN voxels": ("_0000.nii.gz: 1 voxel", "Replace"),
    "infinite voxels": ("_0000.nii.gz: 2 voxel", "Replace"),
    "voxels too large for float32": ("_0000.nii.gz", "Rescale"),
    "a 2D image among 3D": ("_0000.nii.gz", "Convert"),
    "channels of different shape": ("_0000.nii.gz", "Resample"),
    "the name of a labeled case": ("_0000.nii.gz", "rename"),
    "the name of a validation case": ("_0000.nii.gz", "rename"),
    "a name that is not UTF-8": (r"'un_\udce9_0000.nii.gz'", "plain name"),
    "a link that leads nowhere": ("elsewhere.nii.gz", "Bring"),
    "a link to a labeled image": ("the image of tr_", "Remove"),
    "a copy of a labeled image": ("the image of tr_", "Remove"),
    "plans that lead out of the dataset's folder": ("data_identifier '../../x'", "plain name"),
    "plans that are not JSON": ("nnUNetPlans.json", "nnUNetv2_plan_experiment"),
    "JSON that is not plans": ("nnUNetPlans.json", "nnUNetv2_plan_experiment"),
    "no such dataset": ("dataset 950", "Check"),
    "no such plans": ("Missing.json", "-p"),
    "no such configuration": ("3d_lowres", "-c"),
    "a list names a missing case": ("nobody", "without channel"),
    "a list names a case twice": ("val.txt", "Remove"),
    "two lists name one case": ("--labeled and --val", "remove"),
    "the dataset id exists": ("-o", "another id"),
    "more cases than there are": ("--labeled 4 (4) and --val 2 (2)", "fewer"),
    "not a number": ("five", "fraction"),
    "a fraction outside 0 to 1": ("1.5", "between 0 and 1"),
    "a case name that leads elsewhere": ("'/elsewhere'", "plain name"),
    "an empty `file_ending`": ("file_ending ''", "dot"),
    "an image that is a broken link": ("nowhere", "Bring"),
    "no labeled dataset": ("dataset 950", "Check"),
    "no `imagesUn` at training": ("imagesUn", "Put"),
    "unknown setting": ("'cps_wieght'", "'cps_weight'"),
    "ill-typed setting": ("'cps_weight' to 'much'", "a number from 0"),
    "setting out of range": ("'shta_conf_threshold' to 30", "a number from 0 to 1"),
    "NaN as a setting": ("'cps_weight' to nan", "a number from 0"),
    "`keep_epochs` beyond the last epoch": ("'keep_epochs' to [1, 1001]", "train longer"),
    "`_0epochs`": ("nnUNetTrainerCPS_<N>epochs", "Choose"),
    "cascade configuration": ("'3d_cascade_fullres'", "'3d_fullres'"),
    "region-based labels with GA-CPS, MagicNet, SASNet, SS-Net, DHC, SKCDF or SHTA": (
        "nnUNetTrainerSHTA_CPS",
        "nnUNetTrainerCPS",
    ),
    "three labeled cases, and fold 0": ("splits_final.json", "fold all"),
    "`splits_final.json` names a missing case": ("splits_final.json: fold 0 names nobody", "nnUNetv2_ssl_split"),
    "a fold without validation cases": ("splits_final.json: fold 0", "nnUNetv2_ssl_split"),
    "another training of the same fold": ("fold_0", "Wait"),
    "images that do not register": ("_warped", "warped_share"),
    "`imagesUn` with test images only": ("_warped", "warped_share"),
    "a patient that is not a string": ("groups.json", "patient"),
    "damaged checkpoint at `--c`": ("checkpoint_final.pth", "move it away"),
    "disk full while preparing": ("_unlabeled", "room"),
    "plans changed after preparing": ("preparing 4 of 4", "plans changed: spacing"),
    "`imagesUn` gone, all of it prepared": ("imagesUn", "used as it is"),
}


def tables() -> dict[str, str]:
    """Input -> remedy, or what is said, from all tables of the page."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", DOCS.read_text(encoding="utf-8"), flags=re.M)
    return {name: cell.replace("`", "") for name, cell in rows if name != "---" and not name.startswith("Input")}


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def assert_says(name: str, text: str) -> None:
    """The message of this row names the culprit and the remedy."""
    assert text.startswith("nnunet_ssl: "), text
    assert all(part in text for part in SAID[name]), text


def test_the_page_and_this_file_name_the_same_cases():
    assert set(tables()) == {*PREPROCESS, *SPLIT, *TRAIN, *REDONE} == set(SAID)
    assert [name for name, remedy in tables().items() if SAID[name][1].lower() not in remedy.lower()] == []


@pytest.fixture(scope="module")
def trainings(tiny, tmp_path_factory) -> dict[str, tuple[Outcome, dict, dict]]:
    """All rows that go through ``nnUNetv2_train``, each in a separate process."""
    rows, before = [], {}
    folders = {name: Folders.below(tmp_path_factory.mktemp("row")) for name in TRAIN}
    for name, row in TRAIN.items():
        dataset = a_copy(tiny(row.kind), folders[name])
        configuration, *more = row.spoil(dataset) or [dataset.configuration]
        earlier = dataset.folders.results / dataset.name / f"{row.trainer}__nnUNetPlans__{configuration}" / "fold_0"
        earlier.mkdir(parents=True, exist_ok=True)
        (earlier / "checkpoint_final.pth").write_text("an earlier model")
        config = dataset.folders.raw.parent / "settings.json"
        rows.append(
            {
                "arguments": [str(dataset.id), configuration, "0", "-tr", row.trainer, "-device", "cpu", *more],
                "environment": {
                    **dataset.folders.environment(),
                    **({"nnUNet_ssl_config": str(config)} if config.exists() else {}),
                },
                "out": str(dataset.folders.raw.parent / "out.txt"),
                "err": str(dataset.folders.raw.parent / "err.txt"),
                "limit": 100_000 if "disk" in name else None,
            }
        )
        before[name] = snapshot(dataset.folders.raw.parent)
    codes = train_each(rows)
    return {
        name: (
            Outcome(code, Path(row["out"]).read_text(), Path(row["err"]).read_text()),
            before[name],
            snapshot(folders[name].raw.parent),
        )
        for name, row, code in zip(TRAIN, rows, codes, strict=True)
    }


# What the command nnUNetv2_train calls, once a row, each after a fork: importing nnU-Net takes seconds, and so does
# tidying up after it, hence os._exit. test_the_real_command_ends_with_the_message does without.
TRAIN_EACH = """
import json, os, resource, sys
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
recursive_find_trainer_class_by_name("nnUNetTrainerSHTA_CPS")  # imports whatever there is to import
from nnunet_ssl.shapes import registration, warped
from nnunet_ssl.trainers import base
base.PATIENCE = 0.1
registration.ITERATIONS, warped.BUDGET, warped.LEAST_EACH = 4, 0.0, 1
print(flush=True)
for row in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        for descriptor, file in ((1, row["out"]), (2, row["err"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(row["environment"])
        if row["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (row["limit"], row["limit"]))
        sys.argv = ["nnUNetv2_train", *row["arguments"]]
        code = 0
        try:
            run_training_entry()
        except SystemExit as stopped:
            code = stopped.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def train_each(rows: list[dict]) -> list[int]:
    variables = {
        **os.environ,
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "1",
        "nnUNet_extTrainer": str(ROOT / "nnunet_ssl" / "_ext"),  # where the package is not installed
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }
    process = subprocess.run(
        [sys.executable, "-c", TRAIN_EACH, json.dumps(rows)],
        env=variables,
        encoding="utf-8",
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return [int(code) for code in re.findall(r"^code (-?\d+)$", process.stdout, flags=re.M)]


def a_copy(original: TinyDataset, folders: Folders) -> TinyDataset:
    shutil.copytree(original.raw, folders.raw / original.name)
    unprepared = shutil.ignore_patterns("*_unlabeled", "*_warped*")  # another test's trainer may have prepared them
    shutil.copytree(original.preprocessed, folders.preprocessed / original.name, ignore=unprepared)
    return TinyDataset(original.recipe, folders, original.plans_name)


def run_here(main: Callable[[list[str]], None], arguments: list[Any], capsys: pytest.CaptureFixture) -> Outcome:
    """Run one of our commands in this process. Python prints the text of a SystemExit and ends with 1."""
    capsys.readouterr()
    code, message = 0, ""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code, message = (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code, "")
    out, err = capsys.readouterr()
    return Outcome(code, out, f"{err}\n{message}")


@pytest.mark.parametrize("name", [*PREPROCESS, *SPLIT, *TRAIN, *REDONE])
def test_bad_input(name, tiny_copy, capsys, request):
    may_be_new = r"preprocessed/.*_(unlabeled|warped)/"
    if name in TRAIN:
        outcome, before, after = request.getfixturevalue("trainings")[name]
        may_be_new += (
            r"|results/.*/(\.lock|training_log_.*\.txt|(plans|dataset|dataset_fingerprint)\.json)|out.txt|err.txt"
            r"|preprocessed/[^/]*/splits_final\.json"  # nnU-Net's own, of the first training of a dataset
        )
    else:
        row = {**PREPROCESS, **SPLIT, **REDONE}[name]
        dataset = tiny_copy(row.kind)
        if name in SPLIT:
            main, arguments = split.main, ["-d", dataset.id, "-o", 951, "--labeled", 2]
            may_be_new = "nothing"
        else:
            main = preprocess.main
            arguments = ["-d", dataset.id, "-c", dataset.configuration, "-p", dataset.plans_name, "-np", 1]
            main([str(argument) for argument in arguments])  # there is something to lose
        more = row.spoil(dataset)
        before = snapshot(dataset.folders.raw.parent)
        outcome = run_here(main, [*arguments, *(more or [])], capsys)
        after = snapshot(dataset.folders.raw.parent)

    assert "Traceback" not in outcome.err + outcome.out
    if name in REDONE:
        assert outcome.code == 0, outcome.err
        assert_says(name, outcome.out.splitlines()[0])
        return
    assert outcome.code == 1, outcome.out + outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("nnunet_ssl:")]
    assert len(messages) == 1, outcome.err
    assert_says(name, messages[0])
    assert {file: after.get(file) for file in before} == before
    new = [file for file in after if file not in before and not re.match(may_be_new, file.removeprefix("nnunet/"))]
    assert new == []


@pytest.mark.slow  # tests/trainers/test_lost.py has one that runs and ends so
def test_the_real_command_ends_with_the_message(tiny_copy, run_nnunet):
    dataset = tiny_copy("3d")
    process = run_nnunet(
        "nnUNetv2_train", dataset.id, dataset.configuration, 0, "-tr", "nnUNetTrainerCPS", "-device", "cpu",
        settings={"cps_wieght": 0.5}, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert_says("unknown setting", process.stderr.strip().splitlines()[-1])
    assert "Traceback" not in process.stderr


def test_a_command_of_ours_ends_with_the_message(tiny_copy, run_nnunet):
    with environment({"nnUNet_raw": ""}):
        process = run_nnunet("nnUNetv2_ssl_split", "-d", "4", "-o", "504", "--labeled", "5", check=False)
    assert process.returncode == 1
    assert re.match("nnunet_ssl: .* nnUNet_raw .* Set ", process.stderr.strip().splitlines()[-1])
