"""Checkpoints are plain nnU-Net's, and a run that was killed ends as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import SimpleITK as sitk
import torch
from helpers.runs import NAME, assert_equal, assert_resumed_equals_uninterrupted, resumed, train, weights
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.resuming import find_training_state, fingerprint, training_state_file


@pytest.fixture
def stopped(tiny, make_trainer):
    """A run of three epochs that has stopped after the second, with its latest checkpoint of the first."""
    trainer = make_trainer(NAME, tiny(), settings={"save_every": 1})
    train(trainer, until=1)
    return Path(trainer.output_folder)


def test_a_checkpoint_is_what_nnunet_would_have_written(tiny, make_trainer, stopped):
    ours = torch.load(stopped / "checkpoint_latest.pth", weights_only=False)
    plain = make_trainer("nnUNetTrainer", tiny())
    plain.on_train_start()
    plain.on_epoch_start()
    plain.on_train_epoch_start()
    plain.train_step(next(plain.dataloader_train))
    plain.save_checkpoint(str(stopped / "plain.pth"))
    theirs = torch.load(stopped / "plain.pth", weights_only=False)
    assert ours.keys() == theirs.keys()
    assert ours["trainer_name"] == "nnUNetTrainer"
    assert {n: t.shape for n, t in ours["network_weights"].items()} == {
        n: t.shape for n, t in theirs["network_weights"].items()
    }
    assert ours["optimizer_state"]["state"].keys() == theirs["optimizer_state"]["state"].keys()
    plain.load_checkpoint(str(stopped / "checkpoint_latest.pth"))  # stock nnU-Net goes on from it


def test_the_state_is_of_plain_types_so_loading_runs_no_code(stopped):
    state = torch.load(stopped / "checkpoint_latest_ssl.pth", weights_only=True)
    assert any(name.startswith("second.") for name in state["modules"])
    assert any(name.startswith("shta_first.") for name in state["modules"])


def test_resumed_in_process_it_ends_with_the_same_weights(tiny, make_trainer):
    folder = assert_resumed_equals_uninterrupted(lambda: make_trainer(NAME, tiny(), settings={"save_every": 1}))
    log = (folder / "ssl_log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch", "0", "1", "2"]
    assert not list(folder.glob("checkpoint_latest*"))


def test_killed_between_the_two_files_it_finds_the_state_that_fits(tiny, make_trainer, stopped):
    """The new checkpoint is in place, its state still has its temporary name, the old state the final one."""
    state = training_state_file(str(stopped / "checkpoint_latest.pth"))
    os.replace(state, state + ".new")
    other = make_trainer(NAME, tiny(), settings={"seed": 5})
    other.output_folder = str(stopped / "other")
    os.makedirs(other.output_folder)
    other.save_checkpoint(other.output_folder + "/checkpoint_latest.pth")
    shutil.copy(other.output_folder + "/checkpoint_latest_ssl.pth", state)
    trainer = resumed(make_trainer, tiny, stopped)
    trainer.on_train_start()
    assert_equal(dict(trainer.training_modules.state_dict()), torch.load(state, weights_only=True)["modules"])
    assert not os.path.exists(state + ".new")  # what the kill cut off is finished


def test_a_missing_state_is_refused_but_validation_needs_none(tiny, make_trainer, stopped):
    (stopped / "checkpoint_latest_ssl.pth").unlink()
    before = sorted(stopped.iterdir())
    trainer = resumed(make_trainer, tiny, stopped)  # all that --val does
    with pytest.raises(UserError, match=r"checkpoint_latest_ssl\.pth is missing.*-pretrained_weights"):
        trainer.on_train_start()
    assert set(before) <= set(stopped.iterdir())


@pytest.mark.parametrize("damage", ["other network", "cut short", "not a state", "nothing of ours"])
def test_a_foreign_or_damaged_state_is_refused(tiny, make_trainer, stopped, damage):
    file = stopped / "checkpoint_latest_ssl.pth"
    state = torch.load(file, weights_only=True)
    if damage == "other network":
        torch.save({**state, "network": "0" * 64}, file)
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "not a state":
        shutil.copy(stopped / "checkpoint_latest.pth", file)
    else:
        file.write_text("{}")
    with pytest.raises(UserError, match="belongs to another checkpoint"):
        resumed(make_trainer, tiny, stopped).on_train_start()


def test_a_training_state_is_mapped_and_not_read_into_memory(tmp_path):
    network, process = torch.nn.Linear(2, 2), psutil.Process()
    state = {"network": fingerprint(network), "large": torch.ones(2**24)}  # 64 MiB
    torch.save(state, tmp_path / "state.pth")
    del state
    before = process.memory_info().rss
    _, state = find_training_state(str(tmp_path / "state.pth"), network)
    assert process.memory_info().rss - before < 2**24
    assert state["large"][-1] == 1


def test_a_resumed_run_is_not_tied_to_the_file_that_it_came_from(tiny, make_trainer, stopped):
    trainer = resumed(make_trainer, tiny, stopped)
    trainer.on_train_start()
    momentum = trainer.training_optimizer.state_dict()["state"].values()
    held = [*trainer.training_modules.state_dict().values(), *(s["momentum_buffer"] for s in momentum)]
    before = [t.clone() for t in held]
    file = stopped / "checkpoint_latest_ssl.pth"
    with file.open("r+b") as opened:  # as it never is: a save replaces it whole
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_settings_in_force_are_written_and_hold_for_the_rest_of_the_run(stopped, tiny, make_trainer, monkeypatch):
    written = json.loads((stopped / "ssl_settings.json").read_text())
    assert written["trainer"] == NAME
    assert written["settings"]["save_every"] == 1
    from nnunet_ssl.trainers import nnUNetTrainerSHTA_CPS

    dataset = tiny()

    def continued():
        class_ = type(NAME, (nnUNetTrainerSHTA_CPS,), {"epochs": 3})
        plans = {**dataset.plans, "continue_training": True}
        return class_(plans, dataset.configuration, 0, dataset.dataset_json, torch.device("cpu"))

    monkeypatch.delenv("nnUNet_ssl_config")
    assert continued().settings.save_every == 1  # what it was started with, not the default of 50
    changed = stopped / "changed.json"
    changed.write_text(json.dumps({**written["settings"], "cps_weight": 7}))
    monkeypatch.setenv("nnUNet_ssl_config", str(changed))
    with pytest.raises(UserError, match=r"'cps_weight' to 7\.0.*started with 1\.0"):
        continued()


def test_a_checkpoint_of_a_run_with_other_settings_is_not_continued(tiny, make_trainer, stopped):
    """As after a run that was started anew in the same folder and killed before its first checkpoint."""
    trainer = resumed(make_trainer, tiny, stopped, seed=3, cps_weight=0.5)
    with pytest.raises(UserError, match=r"other settings.*\(seed, cps_weight\)"):
        trainer.on_train_start()


@pytest.fixture
def began(tiny, make_trainer, monkeypatch):
    """``began(until, **settings)``: a run of three epochs anew; ``began.continued()``: the one that ``--c`` takes."""
    name = "nnUNetTrainerLabeledOnly_3epochs"

    def begin(until=None, **settings):
        trainer = make_trainer(name, tiny(), settings={"save_every": 1, "seed": None, **settings})
        if until == 0:
            trainer.on_train_start()  # stopped in its first epoch
        else:
            train(trainer, until=until)
        return trainer

    def continued():
        monkeypatch.delenv("nnUNet_ssl_config", raising=False)
        plans = {**tiny().plans, "continue_training": True}
        trainer = getattr(trainers, name)(plans, "3d_fullres", 0, tiny().dataset_json, torch.device("cpu"))
        maybe_load_checkpoint(trainer, True, False)  # nnU-Net's own
        trainer.on_train_start()
        return trainer

    begin.continued = continued
    return begin


def test_after_c_was_forgotten_the_earlier_run_goes_on(began):
    """As in nnU-Net: what was begun anew has left no checkpoint, but its own drawn seed in ``ssl_settings.json``."""
    first = began(until=1)
    anew = began(until=0, num_val_iterations_per_epoch=2)
    assert anew.settings.seed != first.settings.seed
    trainer = began.continued()
    assert (trainer.settings, trainer.run_id, trainer.current_epoch) == (first.settings, first.run_id, 1)
    written = json.loads((Path(first.output_folder) / "ssl_settings.json").read_text())
    assert (written["run"], written["settings"]["seed"]) == (first.run_id, first.settings.seed)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_finished_run_does_not_stand_in_for_a_later_one(began, seed):
    """nnU-Net takes the final checkpoint first, which tells nothing of what was corrected meanwhile."""
    fold = Path(began(seed=seed).output_folder)
    later = began(until=1, seed=seed)
    with pytest.raises(UserError, match=r"final.pth is of an earlier run than checkpoint_latest.pth.*_ssl.pth aw"):
        began.continued()
    for name in ("checkpoint_final.pth", "checkpoint_final_ssl.pth"):
        (fold / name).rename(fold / f"earlier_{name}")
    trainer = began.continued()
    assert (trainer.run_id, trainer.current_epoch) == (later.run_id, 1)


def test_the_end_removes_no_file_of_the_users(began):
    trainer = began(until=1)
    fold = Path(trainer.output_folder)
    mine = fold / "checkpoint_latest_backup.pth"
    mine.write_bytes(b"mine")
    train(began.continued())
    assert mine.read_bytes() == b"mine"
    assert sorted(file.name for file in fold.glob("checkpoint_latest*")) == [mine.name]


def test_without_a_seed_one_is_drawn_and_written(tiny, make_trainer):
    seeds = {make_trainer(NAME, tiny(), settings={"seed": None}, initialize=False).settings.seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(isinstance(seed, int) for seed in seeds)


def test_checkpoints_of_named_epochs_are_kept(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"keep_epochs": [1, 3]})
    train(trainer)
    folder = Path(trainer.output_folder)
    assert torch.load(folder / "checkpoint_epoch1.pth", weights_only=False)["current_epoch"] == 1
    last, final = (torch.load(folder / f"checkpoint_{n}.pth", weights_only=False) for n in ("epoch3", "final"))
    assert_equal(last["network_weights"], final["network_weights"])


def test_the_best_epoch_so_far_stays_the_best(tiny, make_trainer):
    """nnU-Net saves the latest checkpoint before it compares; what follows must be better than this epoch."""
    trainer = make_trainer(NAME, tiny(), settings={"save_every": 1})
    train(trainer, until=1)
    assert trainer._best_ema is not None
    assert resumed(make_trainer, tiny, Path(trainer.output_folder))._best_ema == trainer._best_ema


def test_a_finished_run_keeps_the_record_of_its_images(tiny_copy, make_trainer):
    """``--c`` of it validates again; images that came since were not learned from."""
    dataset = tiny_copy()
    trainer = make_trainer("nnUNetTrainerCPS_1epochs", dataset)
    train(trainer)
    folder = Path(trainer.output_folder)
    before = (folder / "ssl_settings.json").read_text(), training_state(folder)["unlabeled"]
    image = sorted((dataset.raw / "imagesUn").iterdir())[0]
    image.rename(image.with_name("new_0000.nii.gz"))
    trainer = make_trainer("nnUNetTrainerCPS_1epochs", dataset)
    trainer.load_checkpoint(str(folder / "checkpoint_final.pth"))
    train(trainer)
    assert ((folder / "ssl_settings.json").read_text(), training_state(folder)["unlabeled"]) == before


def test_a_run_goes_on_only_with_the_unlabeled_images_that_it_began_with(tiny_copy, make_trainer):
    dataset = tiny_copy()
    folder = Path(make_trainer(NAME, dataset, settings={"save_every": 1}, initialize=False).output_folder)
    train(make_trainer(NAME, dataset, settings={"save_every": 1}), until=1)
    record = (folder / "ssl_settings.json").read_text()
    assert sorted(json.loads(record)["unlabeled_cases"]) == dataset.cases("imagesUn")

    images = dataset.raw / "imagesUn"
    kept = shutil.copytree(images, dataset.folders.raw / "kept")
    removed, changed, *_ = sorted(images.iterdir())
    removed.rename(images / "new_0000.nii.gz")
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(changed)))
    sitk.WriteImage(sitk.GetImageFromArray(array + 1), str(changed))
    told = r"1 added \(new\), 1 removed \(un_00\), 1 changed \(un_01\)\. Put them back.*-pretrained_weights"
    with pytest.raises(UserError, match=told):
        resumed(make_trainer, lambda: dataset, folder).on_train_start()
    assert (folder / "ssl_settings.json").read_text() == record

    shutil.rmtree(images)
    shutil.copytree(kept, images, copy_function=shutil.copyfile)  # with other times
    trainer = resumed(make_trainer, lambda: dataset, folder)
    trainer.on_train_start()
    assert trainer.current_epoch == 1
    assert (folder / "ssl_settings.json").read_text() == record


def training_state(folder):
    return torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)


def wait_for(condition, is_running, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert is_running(), "the run ended before it could be killed"
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)


def killed_runs():
    """When the kill comes, as a test of the fold's folder."""
    log = lambda f: "".join(p.read_text() for p in f.glob("training_log*"))  # noqa: E731
    yield pytest.param(lambda f: "Epoch 1" in log(f), id="during an epoch", marks=pytest.mark.slow)
    yield pytest.param(lambda f: (f / "checkpoint_latest.pth").exists(), id="between epochs", marks=pytest.mark.slow)
    yield pytest.param(lambda f: list(f.glob("*_ssl.pth.new*")), id="while saving", marks=pytest.mark.slow)
    yield pytest.param(lambda f: "Epoch 0" in log(f), id="before any checkpoint", marks=pytest.mark.slow)


def test_killed_during_an_epoch_it_goes_on(tiny, make_trainer):
    """As the real commands do below, in a fork of this process."""
    settings = {"save_every": 1, "num_iterations_per_epoch": 6}
    trainer = make_trainer(NAME, tiny(), settings=settings)
    folder = Path(trainer.output_folder)
    child = multiprocessing.get_context("fork").Process(target=train, args=(trainer,))
    child.start()
    wait_for(lambda: any("Epoch 1" in log.read_text() for log in folder.glob("training_log*")), child.is_alive)
    child.kill()
    child.join()
    trainer = resumed(make_trainer, tiny, folder, **settings)
    assert trainer.current_epoch == 1
    train(trainer)
    found = weights(folder)
    shutil.rmtree(folder)
    train(make_trainer(NAME, tiny(), settings=settings))
    assert_equal(weights(folder), found)


@pytest.mark.parametrize("moment", killed_runs())
def test_kill_9_and_continue_ends_with_the_weights_of_an_uninterrupted_run(
    moment, tiny_copy, make_trainer, run_nnunet, monkeypatch
):
    dataset = tiny_copy()
    settings = {"save_every": 1, "num_iterations_per_epoch": 6}
    command = [dataset.name, dataset.configuration, 0, "-tr", NAME, "-device", "cpu"]
    fold = (
        Path(os.environ["nnUNet_results"]) / dataset.name / f"{NAME}__nnUNetPlans__{dataset.configuration}" / "fold_0"
    )

    processes = []
    real_run = subprocess.run

    def run_and_kill(words, *, env, encoding, stdout, stderr, timeout):
        process = subprocess.Popen(
            words, env=env, encoding=encoding, stdout=stdout, stderr=stderr, start_new_session=True
        )
        processes.append(process)
        wait_for(lambda: fold.is_dir() and moment(fold), lambda: process.poll() is None)
        os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(words, process.wait(), *process.communicate())

    monkeypatch.setattr(subprocess, "run", run_and_kill)
    assert run_nnunet("nnUNetv2_train", *command, settings=settings, check=False).returncode == -signal.SIGKILL
    monkeypatch.setattr(subprocess, "run", real_run)
    assert not (fold / "checkpoint_final.pth").exists()
    run_nnunet("nnUNetv2_train", *command, "--c", settings=settings, env={"nnUNet_n_proc_DA": "2"})
    continued = weights(fold)
    shutil.rmtree(fold)
    # in this process, without workers: the batches are the same; so are sums, with as many threads as the command takes
    threads = torch.get_num_threads()
    torch.set_num_threads(multiprocessing.cpu_count())
    train(make_trainer(NAME, dataset, settings=settings))
    torch.set_num_threads(threads)
    assert_equal(weights(fold), continued)


def test_a_run_from_before_a_setting_was_there_is_continued(tiny, make_trainer, stopped):
    """Its training state does not know the setting, which has its default then, nor what it has learned from."""
    file = stopped / "checkpoint_latest_ssl.pth"
    state = torch.load(file, weights_only=True)
    del state["settings"]["shta_matched_hard"]
    del state["unlabeled"]
    torch.save(state, file)
    trainer = resumed(make_trainer, tiny, stopped)
    trainer.on_train_start()
    assert trainer.current_epoch == 1
