"""Doing steps: what is done is not done again, what fails or is stopped is done next time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from dataclasses import replace

import psutil
import pytest

from nnunet_ssl.benchmark.plan import Step
from nnunet_ssl.benchmark.run import Benchmark, StepError, claimed, refuse_other, resumed, script_of, words_to_run
from nnunet_ssl.errors import UserError


@pytest.fixture
def benchmark(given, make_plan):
    return Benchmark(make_plan(given))


def python(key, code, *words, **more):
    """A step that runs a line of Python."""
    return Step(key, f"Step {key}", ("python", "-c", code, *words), **more)


def test_a_step_is_done_once_and_leaves_a_record(benchmark, tmp_path):
    file = tmp_path / "done.txt"
    code = "import os, sys; open(sys.argv[1], 'a').write(os.environ['WHAT'])"
    step = python("a/b", code, str(file), machine=("--jobs", "3"), variables={"WHAT": "x"})
    benchmark.do(step)
    benchmark.do(replace(step, machine=("--jobs", "4")))  # other words for the machine change nothing
    assert file.read_text() == "x"
    record = json.loads((benchmark.home / "done" / "a" / "b.json").read_text())
    assert record["words"] == list(step.words)
    assert record["seconds"] > 0
    assert record["command"].startswith("WHAT=x python -c")
    assert {"nnunet_ssl", "nnunetv2", "torch", "python"} <= set(record["attempts"][0]["versions"])
    assert record["attempts"][0]["machine"]
    benchmark.do(replace(step, words=(*step.words, "more")))  # another command is another step
    assert file.read_text() == "xx"


def test_what_makes_a_folder_is_done_where_the_folder_is(benchmark, tmp_path):
    step = python("dataset_500", "raise SystemExit(1)", makes=tmp_path / "raw" / "Dataset500_*")
    assert not benchmark.is_done(step)
    (tmp_path / "raw" / "Dataset500_Made").mkdir()
    assert benchmark.is_done(step)
    benchmark.do(step)


def test_a_failed_step_names_its_log_and_is_not_done(benchmark):
    step = python("bad", "print('what went wrong'); raise SystemExit(3)")
    with pytest.raises(StepError, match=r"Step bad: exit code 3.*bad\.txt"):
        benchmark.do(step)
    assert "what went wrong" in (benchmark.home / "logs" / "bad.txt").read_text()
    assert not benchmark.is_done(step)


def test_settings_are_written_and_checkpoints_make_it_go_on(benchmark, tmp_path):
    file = tmp_path / "run" / "settings.json"
    checkpoints = tmp_path / "run" / "results" / "Dataset*" / "model" / "fold_0"
    code = "import json, sys; print(json.load(open(sys.argv[1])), sys.argv[2:])"
    step = python("train", code, str(file), settings=(file, {"seed": 4}), checkpoints=checkpoints)
    assert resumed(step) == step
    fold = tmp_path / "run" / "results" / "Dataset501_Made" / "model" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    benchmark.do(step)
    assert "{'seed': 4} ['--c']" in (benchmark.home / "logs" / "train.txt").read_text()
    assert benchmark.is_done(step)
    with pytest.raises(UserError, match="the same command with other settings"):
        benchmark.is_done(replace(step, settings=(file, {"seed": 5})))


def test_what_goes_on_has_its_pretrained_weights(benchmark, tmp_path):
    """nnU-Net refuses ``-pretrained_weights`` beside ``--c``."""
    code = "import sys; print(sys.argv[1:])"
    step = python("train", code, "-pretrained_weights", "weights.pth", checkpoints=tmp_path)
    assert resumed(step) == step
    (tmp_path / "checkpoint_latest.pth").touch()
    benchmark.do(step)
    assert "\n['--c']\n" in (benchmark.home / "logs" / "train.txt").read_text()
    assert benchmark.is_done(step)


def test_every_attempt_counts(benchmark, tmp_path):
    """One fails, one is killed together with the benchmark, one comes to its end."""
    code = "import pathlib, sys, time; time.sleep(0.3); sys.exit(not pathlib.Path(sys.argv[1]).exists())"
    step = python("train", code, str(tmp_path / "mended"), checkpoints=tmp_path)
    for _ in range(2):  # the first has left no checkpoint, so nothing goes on with it
        with pytest.raises(StepError):
            benchmark.do(step)
    (tmp_path / "checkpoint_latest.pth").touch()
    file = benchmark.home / "attempts" / "train.json"
    first = json.loads(file.read_text())
    file.write_text(json.dumps([*first, {**first[0], "seconds": None}]))
    (tmp_path / "mended").touch()
    benchmark.do(step)
    record = json.loads((benchmark.home / "done" / "train.json").read_text())
    assert [attempt["seconds"] is None for attempt in record["attempts"]] == [False, True, False]
    assert record["seconds"] == pytest.approx(sum(record["attempts"][i]["seconds"] for i in (0, 2)))
    assert record["seconds"] > 0.6
    assert record["attempts"][0]["versions"]["nnunetv2"]


def test_stopping_ends_the_command_and_nothing_else_begins(benchmark):
    step = python("long", "import time; time.sleep(100)")
    errors = []

    def work():
        for one in (step, python("next", "pass")):
            try:
                benchmark.do(one)
            except StepError as error:
                errors.append(str(error))

    thread = threading.Thread(target=work)
    start = time.time()
    thread.start()
    while not benchmark._running and time.time() - start < 30:
        time.sleep(0.02)
    benchmark._stop()
    thread.join(30)
    assert not thread.is_alive()
    assert time.time() - start < 60
    assert len(errors) == 2
    assert not benchmark.is_done(step)


def test_killed_it_leaves_no_command_running(benchmark, tmp_path):
    file = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(600)"
    killed = multiprocessing.get_context("fork").Process(target=benchmark.do, args=(python("long", code, str(file)),))
    killed.start()
    while not file.exists() or not file.read_text().endswith(" "):
        time.sleep(0.02)
    command = psutil.Process(int(file.read_text()))
    killed.kill()
    killed.join()
    _, alive = psutil.wait_procs([command], timeout=20)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert alive == []


def test_a_failed_run_does_not_stop_the_others_and_is_named(benchmark, monkeypatch):
    """The runs' own commands are replaced by short ones; they are tested by ``test_benchmark.py`` of the commands."""
    plan = benchmark.plan
    plan.home.mkdir()

    def steps(run):
        fails = run.row.name == "CPS" and run.seed == 1
        yield python(f"runs/{run.folder.name}_{run.budget.key}", f"raise SystemExit({int(fails)})")

    monkeypatch.setattr(plan, "prepare", lambda: [])
    monkeypatch.setattr(plan, "measure", lambda: [])
    monkeypatch.setattr(plan, "steps_of", steps)
    compared = [(runs, python(step.key, "pass")) for runs, step in plan.compare()]
    monkeypatch.setattr(plan, "compare", lambda: compared)
    assert benchmark.run().startswith("1 failed: Step runs/cps_2labeled_seed1_steps80: exit code 1")
    done = {file.name for file in (benchmark.home / "done").rglob("*.json")}
    assert len([name for name in done if name.startswith("compare")]) == 2  # seed 0, of both tables
    assert len(done) == len(plan.queue()) - 1 + 2
    assert json.loads((benchmark.home / "datasets.json").read_text()) == plan.ids


# ------------------------------------------------------------------------------------------------------- commands


def test_the_dataset_is_filled_in(tmp_path):
    step = Step("x", "x", ("nnUNetv2_ssl_evaluate", "-ref", str(tmp_path / "Dataset501_*" / "labelsTs")))
    with pytest.raises(StepError, match=r"Dataset501_\* is there 0 times"):
        words_to_run(step, "cuda")
    (tmp_path / "Dataset501_A").mkdir()
    words = words_to_run(step, "cuda")
    assert words[1:] == ["-m", "nnunet_ssl.commands.evaluate", "-ref", str(tmp_path / "Dataset501_A" / "labelsTs")]
    (tmp_path / "Dataset501_B").mkdir()
    with pytest.raises(StepError, match="is there 2 times"):
        words_to_run(step, "cuda")


def test_nnunets_commands_are_its_own_and_on_the_cpu_hold_to_one_thread():
    step = Step("x", "x", ("nnUNetv2_train", "501", "3d_fullres", "0"), ("-device", "cpu"))
    assert words_to_run(step, "cuda")[0].endswith("nnUNetv2_train")
    words = words_to_run(step, "cpu")
    # see tests/test_stock_commands.py, and tests/benchmark/test_plan.py for OMP_NUM_THREADS
    assert "from nnunetv2.run.run_training import run_training_entry" in words[-6]
    assert words[-5:] == ["501", "3d_fullres", "0", "-device", "cpu"]


def test_the_script_has_every_step_and_says_what_is_done(benchmark, tmp_path):
    benchmark.plan.protocol = replace(benchmark.plan.protocol, figures=("Labels only", "CPS"))
    lines = list(script_of(benchmark))
    commands = [line for line in lines if not line.startswith(("#", "export", "mkdir", "echo"))]
    plan = benchmark.plan
    runs = [step for run in plan.queue() for step in plan.steps_of(run)]
    steps = [*plan.prepare(), *plan.measure(), *runs, *(step for _, step in [*plan.compare(), *plan.figures()])]
    assert len(commands) == len(steps)
    assert all("nnUNetv2_" in command for command in commands)
    assert any("# num_iterations_per_epoch follows from" in line for line in lines)
    assert not (tmp_path / "home").exists()  # nothing is done

    (tmp_path / "raw" / "Dataset500_Made").mkdir()
    assert next(line for line in script_of(benchmark) if "Make the dataset" in line).startswith("# done")


def test_source_of_the_data(given, make_plan, tmp_path):
    given["data"] = {"script": "prepare_la.py"}
    del given["rows"][3]
    benchmark = Benchmark(make_plan(given))
    with pytest.raises(UserError, match=r"prepare_la.py does not exist.*--scripts"):
        benchmark.check_source()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "prepare_la.py").touch()
    with pytest.raises(UserError, match=r"DATA is no folder; .*--data"):
        benchmark.check_source()
    (tmp_path / "raw" / "Dataset500_LA").mkdir()  # it is made already
    benchmark.check_source()


# --------------------------------------------------------------------------------------------------------- folder


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
    with pytest.raises(UserError, match="begun with --device cpu"):
        refuse_other(home, more, "cuda")
    with pytest.raises(UserError, match="begun with 'epochs' 4, the protocol now says 5"):
        refuse_other(home, given | {"epochs": 5}, "cpu")
    more["rows"][1]["settings"] = {}
    with pytest.raises(UserError, match="begun with another row 'CPS'"):
        refuse_other(home, more, "cpu")
    more["rows"][1] = {"name": "cps", "trainer": "nnUNetTrainerCPS"}  # the folders' name is the same
    with pytest.raises(UserError, match="begun with another row 'cps'"):
        refuse_other(home, more, "cpu")


def test_a_row_that_was_left_out_once_is_not_forgotten(given, tmp_path):
    home = tmp_path / "home"
    fewer = given | {"rows": given["rows"][:1] + given["rows"][2:]}
    for protocol in (given, fewer, given):
        with claimed(home, protocol, "cpu"):
            pass
    with claimed(home, fewer, "cpu"):
        pass
    given["rows"][1]["settings"] = {"cps_weight": 2}
    with pytest.raises(UserError, match="begun with another row 'CPS'"):
        refuse_other(home, given, "cpu")


def test_seconds_that_are_kept_stay(given, tmp_path):
    home = tmp_path / "home"
    with claimed(home, given, "cpu"):
        (home / "seconds_a_step.json").write_text(json.dumps({"cps": 0.5}))
    more = given | {"measure": {**given["measure"], "seconds": {"CPS": 0.5001, "Labels only": 0.1}}}
    refuse_other(home, more, "cpu")  # as it is printed
    with claimed(home, more, "cpu"):
        pass
    refuse_other(home, given, "cpu")  # seconds may go again, with their row
    with pytest.raises(UserError, match="begun with 'measure'"):
        refuse_other(home, given | {"measure": {"epochs": 5}}, "cpu")
    with pytest.raises(UserError, match=r"begun with 0\.5 seconds a step of 'CPS', the protocol now gives 0\.4"):
        refuse_other(home, given | {"measure": {**given["measure"], "seconds": {"CPS": 0.4}}}, "cpu")


def test_the_steps_that_equal_time_goes_by_stay(given, tmp_path):
    home = tmp_path / "home"
    with claimed(home, given, "cpu"):
        pass
    refuse_other(home, given | {"budgets": [*given["budgets"], {"steps": 160}]}, "cpu")
    with pytest.raises(UserError, match=r"begun with 80 as the first budget in steps, .* now says 160"):
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
        pytest.raises(UserError, match=r"cannot be written .*; take another -o"),
        claimed(tmp_path / "file" / "home", given, "cpu"),
    ):
        pass


def test_two_at_a_time_or_a_folder_of_something_else(given, tmp_path):
    home = tmp_path / "home"
    works = pytest.raises(UserError, match="another nnUNetv2_ssl_benchmark works in")
    with claimed(home, given, "cpu"), works, claimed(home, given, "cpu"):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and holds no benchmark"), claimed(tmp_path / "other", given, "cpu"):
        pass
