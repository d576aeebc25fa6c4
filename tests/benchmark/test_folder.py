"""The folder of a benchmark: what may be added to it, and who may work in it."""

from __future__ import annotations

import errno
import json
import os

import pytest

from nnunet_ssl.benchmark.folder import claimed, refuse_other, with_own_lists
from nnunet_ssl.errors import UserError


def test_a_folder_takes_more_rows_and_seeds_but_no_other_protocol(given, tmp_path):
    home = tmp_path / "home"
    with claimed(home, given, "cpu"):
        pass
    more = json.loads(json.dumps(given))
    more["seeds"] += [2]
    more["rows"] += [{"name": "URPC", "trainer": "nnUNetTrainerURPC"}]
    more["about"] = "something else"
    more["gap"] = {"lower": "Labels only", "upper": "More labels"}
    more["rows"][2]["against"] = "Labels only"
    refuse_other(home, more, "cpu")
    with pytest.raises(UserError, match='started with -device "cpu", now it is "cuda"'):
        refuse_other(home, more, "cuda")
    with pytest.raises(UserError, match="started with epochs 4, now it is 5"):
        refuse_other(home, given | {"epochs": 5}, "cpu")
    more["rows"][1]["settings"] = {}
    with pytest.raises(UserError, match="started with row cps"):
        refuse_other(home, more, "cpu")
    more["rows"][1] = {"name": "cps", "trainer": "nnUNetTrainerCPS"}  # the folders' name is the same
    with pytest.raises(UserError, match="started with row cps"):
        refuse_other(home, more, "cpu")


def test_lists_of_cases_are_copied_and_stay(given, tmp_path, write_protocol):
    home, file = tmp_path / "home", write_protocol(given)
    with claimed(home, given, "cpu"):
        copy = with_own_lists(home, given, file)
    assert copy["data"] == given["data"] | {"test": str(home / "lists" / "test" / "test.txt")}
    (tmp_path / "test.txt").write_text("case_006\r\ncase_007")  # the same cases
    assert with_own_lists(home, given, file) == copy
    refuse_other(home, copy, "cpu")
    (tmp_path / "test.txt").write_text("case_001\ncase_002\n")
    with pytest.raises(UserError, match=r"test.txt lists other cases than .*lists/test/test.txt"):
        with_own_lists(home, given, file)
    with pytest.raises(UserError, match="started with data"):
        refuse_other(home, given | {"data": given["data"] | {"test": "other.txt"}}, "cpu")


def test_a_row_that_was_left_out_once_is_not_forgotten(given, tmp_path):
    home = tmp_path / "home"
    fewer = given | {"rows": given["rows"][:1] + given["rows"][2:]}
    for protocol in (given, fewer, given):
        with claimed(home, protocol, "cpu"):
            pass
    with claimed(home, fewer, "cpu"):
        pass
    given["rows"][1]["settings"] = {"cps_weight": 2}
    with pytest.raises(UserError, match="started with row cps"):
        refuse_other(home, given, "cpu")


def test_seconds_that_a_row_was_begun_with_stay(given, tmp_path):
    home = tmp_path / "home"
    given["measure"]["seconds"] = {"CPS": 0.5}
    with claimed(home, given, "cpu"):
        pass
    more = json.loads(json.dumps(given))
    more["rows"].append({"name": "URPC", "trainer": "nnUNetTrainerURPC"})
    more["measure"]["seconds"]["URPC"] = 0.1
    refuse_other(home, more, "cpu")  # seconds come and go with their rows
    without = given | {"rows": [row for row in given["rows"] if row["name"] != "CPS"], "measure": {**given["measure"]}}
    del without["measure"]["seconds"]
    for protocol in (without, given):  # also after it was left out
        with claimed(home, protocol, "cpu"):
            pass
    with pytest.raises(UserError, match="started with measure"):
        refuse_other(home, given | {"measure": {"epochs": 5}}, "cpu")
    for seconds, now in ({"CPS": 0.4}, "0.4"), ({}, "null"):
        with pytest.raises(UserError, match=f'started with row cps .*"seconds per step": 0.5.* now .*step": {now}'):
            refuse_other(home, given | {"measure": {**given["measure"], "seconds": seconds}}, "cpu")


def test_the_steps_that_equal_time_goes_by_stay(given, tmp_path):
    home = tmp_path / "home"
    with claimed(home, given, "cpu"):
        pass
    refuse_other(home, given | {"budgets": [*given["budgets"], {"steps": 160}]}, "cpu")
    with pytest.raises(UserError, match="started with the first budget's steps 80, now it is 160"):
        refuse_other(home, given | {"budgets": [{"steps": 160}, *given["budgets"]]}, "cpu")


def test_a_file_system_without_locks_is_said_and_worked_on(given, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "home", given, "cpu"):
        pass
    assert "without locks" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot be written .* Choose another -o"),
        claimed(tmp_path / "file" / "home", given, "cpu"),
    ):
        pass


def test_two_at_a_time_or_a_folder_of_something_else(given, tmp_path):
    home = tmp_path / "home"
    works = pytest.raises(UserError, match="another nnUNetv2_ssl_benchmark is using")
    with claimed(home, given, "cpu"), works, claimed(home, given, "cpu"):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists but is not a benchmark"), claimed(tmp_path / "other", given, "cpu"):
        pass
