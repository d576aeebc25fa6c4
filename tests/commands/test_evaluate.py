"""``nnUNetv2_ssl_evaluate``: the real command on tiny files, its arguments, where it writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.label_maps import write_dataset

from nnunet_ssl.commands.evaluate import main, method_names
from nnunet_ssl.errors import UserError

SUMMARY = {"summary.json", "summary.md", "cases.csv"}
COMPARISON = {"comparison.json", "comparison.md", "comparison.csv"}


def names_in(folder):
    """Of files and folders."""
    return {path.name for path in folder.iterdir()}


def test_the_real_command_compares_two_methods(tmp_path, run_nnunet):
    truth = write_dataset(tmp_path, ("a", "b"), class_groups={"Large": ["one", "two"]})
    done = run_nnunet(
        "nnUNetv2_ssl_evaluate", "-ref", truth, "-pred", tmp_path / "a", tmp_path / "b", "--names", "CPS", "CPS + SHTA",
        "-np", 2, "-o", tmp_path / "out", "--spacing", "voxel", "--tolerance", 2, "--empty", "128",
    )  # fmt: skip
    assert names_in(tmp_path / "out") == {"CPS", "CPS + SHTA", *COMPARISON}
    assert names_in(tmp_path / "out" / "CPS + SHTA") == SUMMARY
    summary = json.loads((tmp_path / "out" / "CPS" / "summary.json").read_text())
    assert summary["options"] == {"spacing": "voxel", "tolerance": 2.0, "empty": "128"}
    assert len(summary["metric_per_case"]) == 4
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") in done.stdout
    assert "Mean Dice (%) ↑" in done.stdout
    assert "Evaluating" in done.stderr  # the bar


def test_the_real_command_ends_with_the_message_of_what_is_wrong(tmp_path, run_nnunet):
    truth = write_dataset(tmp_path)
    (tmp_path / "a" / "case_2.nii.gz").unlink()
    done = run_nnunet("nnUNetv2_ssl_evaluate", "-ref", truth, "-pred", tmp_path / "a", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("nnunet_ssl: nothing was evaluated")
    assert f"{tmp_path / 'a' / 'case_2.nii.gz'} is missing" in done.stderr
    assert not SUMMARY & names_in(tmp_path / "a")


def test_a_log_that_is_not_utf8_gets_the_table_too(tmp_path, run_nnunet):
    """As on Windows, where the output goes to a file; the arrows of the table are in no such encoding."""
    truth = write_dataset(tmp_path)
    arguments = ["-ref", truth, "-pred", tmp_path / "a", "--metrics", "dice"]
    done = run_nnunet("nnUNetv2_ssl_evaluate", *arguments, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert "Dice (%) ?" in done.stdout


def test_one_method_is_summarised_where_its_predictions_are(tmp_path, capsys):
    truth = write_dataset(tmp_path)
    main(["-ref", str(truth), "-pred", str(tmp_path / "a"), "--metrics", "nsd", "dice"])
    assert names_in(tmp_path / "a") >= SUMMARY
    assert "| Class | Dice (%) ↑ | NSD (%) ↑ | Missed" in capsys.readouterr().out
    main(["-ref", str(truth), "-pred", str(tmp_path / "a"), "-o", str(tmp_path / "out")])  # and again, elsewhere
    assert names_in(tmp_path / "out") == SUMMARY


def test_folder_that_cannot_be_written(tmp_path):
    truth = write_dataset(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        main(["-ref", str(truth), "-pred", str(tmp_path / "a"), "-o", str(tmp_path / "file")])


def test_full_disk(tmp_path):
    """The limit of a file's size stands for it."""
    truth = write_dataset(tmp_path)
    code = (
        "import resource, sys; from nnunet_ssl.commands.evaluate import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); main(sys.argv[1:])"
    )
    arguments = ["-ref", str(truth), "-pred", str(tmp_path / "a"), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert f"{tmp_path}/out/summary.json" in said
    assert "room" in said
    assert not names_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-pred", "a", "-np", "0"], "-np: '0' must be a whole number from 1"),
        (["-pred", "a", "--tolerance", "-1"], "--tolerance: '-1' must be a number from 0"),
        (["-pred", "a", "--tolerance", "nan"], "--tolerance: 'nan' must be a number from 0"),
        (["-pred", "a", "b"], "name a folder for the comparison with -o"),
        (["-pred", "a", "b", "-o", "out", "--names", "x"], r"--names gives 1 name\(s\) for 2"),
        (["-pred", "a", "b", "-o", "out", "--names", "x", "x"], "two methods are named x"),
        (["-pred", "a", "--names", "x/y"], "--names: method 'x/y' has a path separator in it"),
        (["-pred", "a", "--names", "x\udc80"], "--names: method '.*' is not UTF-8"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["-ref", "labels", *arguments])


def test_folders_of_the_same_name_are_told_apart_by_their_paths():
    assert method_names(["runs/cps/test", "runs/shta/test/"], None) == ["cps_test", "shta_test"]
    assert method_names(["../x/pred", "../y/pred"], None) == ["x_pred", "y_pred"]
    assert method_names(["a/x/pred", "b/x/pred"], None) == ["a_x_pred", "b_x_pred"]
    assert method_names(["runs/cps", "other/shta"], None) == ["cps", "shta"]
