"""Steps are done once, and done again or refused where that is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.damage import JSON_DAMAGE

from nnunet_ssl.errors import UserError
from nnunet_ssl.steps import Step, Steps, differences, training

TEACHER = {"fold": "0", "checkpoint": ["checkpoint_final.pth", 1, 2, "digest"]}
STEPS = Steps("cpu", "take another folder")


@pytest.fixture
def step(tmp_path: Path) -> Step:
    """Writes a file, and a line for each time that it is done."""
    script = tmp_path / "write.py"
    script.write_text("import sys\nfor file in sys.argv[1:]: open(file, 'a').write('done\\n')\n")
    made = tmp_path / "made"
    write = ["python", str(script), str(made), str(tmp_path / "times")]
    return Step(tmp_path / "steps" / "write.json", (made,), (write,), {"keep": 0.5}, "Writing", "it is written")


def times(step: Step) -> int:
    file = step.makes[0].with_name("times")
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_step_is_done_once(step, capsys):
    assert not STEPS.is_done(step)
    STEPS.do(step)
    assert STEPS.is_done(step)
    assert "\nWriting\n  $ python" in capsys.readouterr().out
    STEPS.do(step)
    assert capsys.readouterr().out == "  # it is written\n"
    assert times(step) == 1
    record = json.loads(step.record.read_text())
    assert record["made_with"] == {"keep": 0.5}
    assert record["commands"][0].startswith("python ")


def test_a_step_is_done_again_where_its_record_or_its_result_is_gone(step):
    for number, lost in enumerate((step.record, step.makes[0], step.record), start=1):
        STEPS.do(step)
        assert times(step) == number
        lost.unlink()


def test_a_step_with_other_settings_is_refused(step):
    STEPS.do(step)
    with pytest.raises(
        UserError, match=r"other options.*: keep was 0\.5, now 0\.8\. Go back .* or take another folder"
    ):
        STEPS.do(replace(step, made_with={"keep": 0.8}))
    assert times(step) == 1


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_damaged_record_is_named(step, damage):
    STEPS.do(step)
    JSON_DAMAGE[damage](step.record)
    with pytest.raises(UserError, match=step.record.name):
        STEPS.do(step)
    assert times(step) == 1


def test_a_step_that_fails_is_not_recorded(step, tmp_path):
    """Nor is one that made part of what an earlier run of it had made."""
    STEPS.do(step)
    step.makes[0].unlink()
    half = f"open({str(step.makes[0])!r}, 'w'); raise SystemExit(3)"
    failing = replace(step, commands=(["python", "-c", half],))
    with pytest.raises(UserError, match="python ended with exit code 3; its output is above"):
        STEPS.do(failing)
    assert not STEPS.is_done(step)
    log, seen = tmp_path / "log.txt", []
    failing = replace(step, commands=(["python", "-c", "print('a line'); raise SystemExit(4)"],))
    with pytest.raises(UserError, match=f"exit code 4; its output is at the end of {log}"):
        Steps("cpu", "", log=log, show=seen.append).do(failing)
    assert seen == ["a line\n"]
    assert log.read_text().endswith("\na line\n")


def test_a_dry_run_does_nothing(step, capsys):
    Steps("cpu", "", dry_run=True).do(step)
    assert "  $ python" in capsys.readouterr().out
    assert not step.record.exists()
    assert times(step) == 0


def test_a_training_goes_on_where_it_has_left_a_checkpoint(tmp_path):
    words = ["nnUNetv2_train", "4"]
    assert training(words, tmp_path, "-pretrained_weights", "w") == [*words, "-pretrained_weights", "w"]
    (tmp_path / "checkpoint_latest.pth").touch()
    assert training(words, tmp_path, "-pretrained_weights", "w") == [*words, "--c"]


def test_differences_are_named():
    now = {"source": "A", "teacher": TEACHER, "keep": 0.8}
    assert differences(now, now) == []
    assert differences({**now, "keep": 0.5}, now) == ["keep was 0.5, now 0.8"]
    assert differences({"source": "A", "teacher": TEACHER, "min_confidence": 0.9}, now) == [
        "keep was not given, now 0.8",
        "min_confidence was 0.9, now not given",
    ]
    for checkpoint, says in (
        (["checkpoint_final.pth", 1, 99, "digest"], []),
        (["checkpoint_final.pth", 1, 2, "another"], ["teacher's checkpoint_final.pth was another file"]),
        (["checkpoint_best.pth", 1, 2, "digest"], ["teacher's checkpoint was checkpoint_best.pth, "
                                                   "now checkpoint_final.pth"]),
        ([], ["teacher's checkpoint was [], now checkpoint_final.pth"]),
        (None, ["teacher's checkpoint was None, now checkpoint_final.pth"]),
    ):  # fmt: skip
        assert differences({**now, "teacher": {**TEACHER, "checkpoint": checkpoint}}, now) == says
    assert differences({**now, "teacher": {**TEACHER, "fold": "1"}}, now) == ["teacher's fold was 1, now 0"]
    assert differences({**now, "teacher": 3}, now) == ["teacher's record was 3"]
    assert differences([], now) == ["record was []"]
