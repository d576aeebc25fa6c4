"""Whole trainings, in this process and by nnU-Net's commands: stopped, continued, and their weights."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import torch

NAME = "nnUNetTrainerSHTA_CPS_3epochs"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a finished run."""
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    state = torch.load(folder / "checkpoint_final_ssl.pth", weights_only=True)
    return {**checkpoint["network_weights"], **{f"training.{n}": t for n, t in state["modules"].items()}}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def train(trainer, until: int | None = None) -> None:
    """nnU-Net's training loop, stopped after an epoch as a kill would stop it: nothing is closed or saved."""
    trainer.on_train_start()
    for epoch in range(trainer.current_epoch, trainer.num_epochs):
        if epoch == until:
            return
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        trainer.on_train_epoch_end(outputs)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
    trainer.on_train_end()


def assert_resumed_equals_uninterrupted(make, until: int = 1) -> Path:
    """A run that stops, and one that goes on from its latest checkpoint, end as a run that does not stop.

    Args:
        make: makes a trainer that saves each epoch, always into the same folder.
        until: epoch before which the first one stops.

    Returns:
        The folder of the whole run.
    """
    stopped = make()
    train(stopped, until)
    folder = Path(stopped.output_folder)
    resumed = make()
    resumed.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert resumed.current_epoch == until
    train(resumed)
    at_the_end, log = weights(folder), (folder / "ssl_log.csv").read_text()
    shutil.rmtree(folder)
    train(make())
    assert_equal(weights(folder), at_the_end)
    assert (folder / "ssl_log.csv").read_text() == log
    return folder


def assert_plain_checkpoint(folder: Path, plain) -> None:
    """The final checkpoint says that it is nnU-Net's own, and fits the network of ``plain``, an ``nnUNetTrainer``."""
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    plain.network.load_state_dict(checkpoint["network_weights"])
    assert checkpoint["trainer_name"] == "nnUNetTrainer"


def resumed(make_trainer, tiny, folder: Path, name: str = NAME, **settings):
    """A trainer that goes on from the latest checkpoint in ``folder``."""
    trainer = make_trainer(name, tiny(), settings={"save_every": 1, **settings})
    trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    return trainer


def commands_work(dataset, run_nnunet, tmp_path, name, terms):
    """Train two epochs, as if killed after the first; continue, validate, and predict with the plain checkpoint."""
    job = [dataset.id, dataset.configuration, 0, "-tr", name, "-device", "cpu"]
    run_nnunet("nnUNetv2_train", *job, settings={"keep_epochs": [1]})
    fold = next(dataset.folders.results.glob(f"{dataset.name}/{name}__*/fold_0"))
    finished = weights(fold)
    for stem in ("", "_ssl"):
        (fold / f"checkpoint_epoch1{stem}.pth").rename(fold / f"checkpoint_latest{stem}.pth")
        (fold / f"checkpoint_final{stem}.pth").unlink()
    run_nnunet("nnUNetv2_train", *job, "--c")
    continued = weights(fold)
    assert all(torch.equal(w, continued[n]) for n, w in finished.items())
    with open(fold / "ssl_log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert terms <= set(rows[0])
    (fold / "validation" / "summary.json").unlink()
    run_nnunet("nnUNetv2_train", *job, "--val")
    assert (fold / "validation" / "summary.json").is_file()
    assert torch.load(fold / "checkpoint_final.pth", weights_only=False)["trainer_name"] == "nnUNetTrainer"
    run_nnunet(
        "nnUNetv2_predict", "-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-tr", name, "-device", "cpu",
        "-i", dataset.raw / "imagesTs", "-o", tmp_path / "out", "--disable_tta", "-npp", 1, "-nps", 1,
        env={"nnUNet_extTrainer": ""},
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == dataset.recipe.test
