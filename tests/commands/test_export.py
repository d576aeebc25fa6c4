"""``nnUNetv2_ssl_export``: what is written is a plain model that gives the trained network's answers."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import JSON_DAMAGE, RunsCode, with_byte_order_mark
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_ssl import export as export_module
from nnunet_ssl.checkpoints import TRUST
from nnunet_ssl.commands.export import main
from nnunet_ssl.errors import UserError

CPS = "nnUNetTrainerCPS_1epochs"
LABELED_ONLY = "nnUNetTrainerLabeledOnly_1epochs"


@pytest.fixture
def trained(tiny: Callable, make_trainer: Callable) -> Callable[..., tuple[Any, list[str]]]:
    """``trained(name, folds=(0,))``: trainers after an epoch, and the command's arguments up to ``-tr``."""

    def train(name: str = CPS, folds: tuple[int | str, ...] = (0,)) -> tuple[list[Any], list[str]]:
        dataset = tiny("3d")
        trainers = []
        for fold in folds:
            trainer = make_trainer(name, dataset, fold=fold, settings={"seed": 1 if fold == "all" else fold})
            trainer.run_training()
            trainers.append(trainer)
        return trainers, ["-d", str(dataset.id), "-c", dataset.configuration, "-tr", name, "-f", *map(str, folds)]

    return train


def model_in(output: Path) -> Path:
    """The one model folder of an export."""
    [model] = output.glob("Dataset*/nnUNetTrainer__*")
    return model


def logits(network: nn.Module, patch: torch.Tensor) -> torch.Tensor:
    """Of a network for prediction."""
    network.decoder.deep_supervision = False
    with torch.no_grad():
        return network.eval()(patch)


def predictor(model: Path, folds: tuple[int | str, ...]) -> nnUNetPredictor:
    """nnU-Net's own, with an exported model."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    return predictor


def test_plain_nnunet_predicts_with_the_trained_network(trained, tmp_path):
    [trainer], arguments = trained()
    main([*arguments, "-o", str(tmp_path / "out")])

    plain = predictor(model_in(tmp_path / "out"), (0,))
    patch = torch.randn(1, 1, 16, 16, 16)
    assert plain.trainer_name == "nnUNetTrainer"
    assert plain.allowed_mirroring_axes == trainer.inference_allowed_mirroring_axes
    torch.testing.assert_close(logits(plain.network, patch), logits(trainer.plans_network, patch), rtol=0, atol=0)


def test_file_holds_cpu_tensors_and_builtins_and_no_optimizer(trained, tmp_path):
    [trainer], arguments = trained()
    main([*arguments, "-o", str(tmp_path / "out")])

    file = model_in(tmp_path / "out") / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)  # raises on anything else
    assert not {"optimizer_state", "grad_scaler_state"} & content.keys()
    assert {tensor.device.type for tensor in content["network_weights"].values()} == {"cpu"}
    assert content["exported_from"]["trainer"] == CPS
    checkpoint = Path(trainer.output_folder) / "checkpoint_final.pth"
    assert file.stat().st_size < checkpoint.stat().st_size
    assert {f.name for f in model_in(tmp_path / "out").iterdir()} == {*export_module.MODEL_FILES, "fold_0"}


def test_serves_as_pretrained_weights(trained, make_trainer, tiny, tmp_path):
    [trainer], arguments = trained()
    main([*arguments, "-o", str(tmp_path / "out")])
    other = make_trainer("nnUNetTrainer", tiny("3d"))
    load_pretrained_weights(other.network, str(model_in(tmp_path / "out") / "fold_0" / "checkpoint_final.pth"))
    torch.testing.assert_close(
        other.network.encoder.state_dict(), trainer.plans_network.encoder.state_dict(), rtol=0, atol=0
    )


def test_what_is_printed_to_be_pasted_is_quoted(trained, tmp_path, capsys):
    _, arguments = trained()
    main([*arguments, "-o", str(tmp_path / "my models"), "--zip"])
    folder, predict, archive, install = capsys.readouterr().out.splitlines()[-4:]
    assert shlex.split(predict)[2] == folder.removeprefix("Wrote ")
    assert shlex.split(install)[1] == archive.removeprefix("Wrote ")
    assert " models" in folder
    assert " models" in archive


def test_both_networks_become_two_folds_that_nnunet_averages(trained, tmp_path, capsys):
    trainers, arguments = trained(folds=(0, 1))
    main([*arguments, "-o", str(tmp_path / "out"), "--both"])
    printed = capsys.readouterr().out

    patch = torch.randn(1, 16, 16, 16)
    wanted = []
    for i, trainer in enumerate(trainers):
        for j, (ordinal, network) in enumerate(trainer.networks().items()):
            own = predictor(model_in(tmp_path / "out"), (2 * i + j,))
            torch.testing.assert_close(logits(own.network, patch[None]), logits(network, patch[None]), rtol=0, atol=0)
            assert f"fold_{2 * i + j}: the {ordinal} network of fold {i}" in printed
            wanted.append(own.predict_logits_from_preprocessed_data(patch))
    averaged = predictor(model_in(tmp_path / "out"), (0, 1, 2, 3)).predict_logits_from_preprocessed_data(patch)
    torch.testing.assert_close(averaged.float(), torch.stack(wanted).float().mean(0), rtol=1e-2, atol=1e-2)
    assert not torch.equal(wanted[0], wanted[1])


def test_folds_keep_their_names(trained, tmp_path):
    _, arguments = trained(LABELED_ONLY, folds=(1, "all"))
    main([*arguments, "-o", str(tmp_path / "out")])
    assert {f.name for f in model_in(tmp_path / "out").glob("fold_*")} == {"fold_1", "fold_all"}


def test_zip_unpacks_to_the_folder(trained, tmp_path):
    _, arguments = trained(LABELED_ONLY)
    main([*arguments, "-o", str(tmp_path / "out"), "--zip"])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        archived = {name for name in archive.namelist() if not name.endswith("/")}
    assert archived == {
        f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.*") if f.is_file()
    }


def test_a_zip_that_does_not_fit_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    _, arguments = trained(LABELED_ONLY)

    def full(file, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"No space left.*in/out is complete.*make room, remove it and export again"):
        main([*arguments, "-o", str(tmp_path / "in/out"), "--zip"])
    assert [file.name for file in (tmp_path / "in").iterdir()] == ["out"]


def refused(arguments: list[str], output: Path, *words: str) -> None:
    """The command ends with one message that has all words, and writes nothing."""
    before = sorted(output.rglob("*")) if output.exists() else None
    with pytest.raises(UserError) as error:
        main([*arguments, "-o", str(output)])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert (sorted(output.rglob("*")) if output.exists() else None) == before
    assert not list(output.parent.glob("*.partial*"))


def test_refuses_what_it_cannot_do(trained, tmp_path):
    [trainer], arguments = trained(LABELED_ONLY)
    fold = Path(trainer.output_folder)
    out = tmp_path / "out"

    refused([*arguments, "-f", "3"], out, "fold_3", "-chk")
    refused([*arguments, "-chk", "nothing.pth"], out, "nothing.pth")
    refused([*arguments, "-f", "one"], out, "-f: 'one'")
    refused([*arguments, "-c", "3d_lowres"], out, "3d_lowres", "no trained model")
    refused([*arguments, "-d", "999"], out, "999")
    refused([*arguments, "--both"], out, LABELED_ONLY, "second network")
    state = fold / "checkpoint_final_ssl.pth"
    state.unlink()
    refused([*arguments, "--both"], out, str(state), "does not exist")

    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(arguments, out, str(out), "exists already")
    (out / "mine.txt").unlink()
    main([*arguments, "-o", str(out)])  # an empty folder will do


def test_refuses_the_training_state_of_another_checkpoint(trained, tmp_path):
    trainers, arguments = trained(folds=(0, 1))
    states = [Path(t.output_folder) / "checkpoint_final_ssl.pth" for t in trainers]
    shutil.copyfile(states[1], states[0])
    refused([*arguments, "--both"], tmp_path / "out", str(states[0]), "another checkpoint")


def test_a_checkpoint_from_a_stranger_runs_nothing(trained, tmp_path, monkeypatch):
    [trainer], arguments = trained(LABELED_ONLY)
    checkpoint = Path(trainer.output_folder) / "checkpoint_final.pth"
    ran = tmp_path / "ran"
    torch.save(torch.load(checkpoint, weights_only=False) | {"further": RunsCode(ran)}, checkpoint)
    refused(arguments, tmp_path / "out", str(checkpoint), "exec", TRUST)
    assert not ran.exists()
    monkeypatch.setenv(TRUST, "1")
    main([*arguments, "-o", str(tmp_path / "out")])
    assert model_in(tmp_path / "out").is_dir()


def test_refuses_damaged_checkpoints(trained, tmp_path):
    [trainer], arguments = trained(LABELED_ONLY)
    checkpoint = Path(trainer.output_folder) / "checkpoint_final.pth"
    whole, content = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=False)
    for damaged, word in ((b"", "is empty"), (whole[: len(whole) // 2], "cut off"), (b"[1, 2]", "cut off")):
        checkpoint.write_bytes(damaged)
        refused(arguments, tmp_path / "out", str(checkpoint), word, "Restore it")
    weights, init_args = content["network_weights"], content["init_args"]
    other = next(iter(weights))
    for changed, word in (
        ([1, 2], "no checkpoint of a training"),
        (content | {"init_args": 3}, "no 'init_args'"),
        (content | {"init_args": init_args | {"configuration": "2d"}}, "of the configuration '2d', not of 3d_fullres"),
        (content | {"network_weights": weights | {other: torch.zeros(3)}}, "no weights of the network"),
        (content | {"network_weights": weights | {other: "text"}}, "no weights of the network"),
        (content | {"network_weights": weights | {3: torch.zeros(3)}}, "no weights of the network"),
    ):
        torch.save(changed, checkpoint)
        refused(arguments, tmp_path / "out", str(checkpoint), word, "Restore it")


def test_refuses_damaged_files_of_the_model(trained, tmp_path):
    [trainer], arguments = trained(LABELED_ONLY)
    model = Path(trainer.output_folder).parent
    for name in ("plans.json", "dataset.json"):
        whole = (model / name).read_bytes()
        for damage in JSON_DAMAGE.values():
            damage(model / name)
            refused(arguments, tmp_path / "out", name)
            if (model / name).is_dir():
                (model / name).rmdir()
            (model / name).write_bytes(whole)
        with_byte_order_mark(model / name)
    main([*arguments, "-o", str(tmp_path / "out")])

    plans = json.loads((model / "plans.json").read_text(encoding="utf-8-sig"))
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["network_class_name"] = "nowhere.Network"
    (model / "plans.json").write_text(json.dumps(plans))
    refused(arguments, tmp_path / "other", "cannot build its network", "Restore it")
    configuration["inherits_from"] = "nobody"
    (model / "plans.json").write_text(json.dumps(plans))
    refused(arguments, tmp_path / "other", str(model / "plans.json"), "nnU-Net does not accept it")


def test_full_disk(trained, tmp_path):
    """The limit of a file's size stands for it."""
    _, arguments = trained(LABELED_ONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused(arguments, tmp_path / "out", "checkpoint_final.pth cannot be written", "Make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refuses_networks_that_are_not_the_plans_own(trained, tmp_path, monkeypatch):
    _, arguments = trained(LABELED_ONLY)

    class WithSigmoid(nnUNetTrainer):
        """The same weights, other answers."""

        @staticmethod
        def build_network_architecture(*args: Any, **kwargs: Any) -> nn.Module:
            network = nnUNetTrainer.build_network_architecture(*args, **kwargs)
            network.register_forward_hook(lambda module, inputs, outputs: outputs.sigmoid())
            return network

    monkeypatch.setattr(export_module, "find_trainer", lambda name: WithSigmoid)
    checkpoint = next(Path(tmp_path).rglob("checkpoint_final.pth"))
    content = torch.load(checkpoint, weights_only=False)
    # nnUNetv2_predict goes by the name in the checkpoint: never advised where that gives another result
    for named, advice in (("nnUNetTrainer", "Train it again"), ("WithSigmoid", "Predict where WithSigmoid is")):
        torch.save(content | {"trainer_name": named}, checkpoint)
        refused(arguments, tmp_path / "out", "plans.json", "plain nnU-Net", advice)

    class Wider(nnUNetTrainer):
        """Weights that the plans' network does not have."""

        @staticmethod
        def build_network_architecture(*args: Any, **kwargs: Any) -> nn.Module:
            network = nnUNetTrainer.build_network_architecture(*args, **kwargs)
            network.further = nn.Linear(1, 1)
            return network

    monkeypatch.setattr(export_module, "find_trainer", lambda name: Wider)
    content["network_weights"] |= nn.Linear(1, 1).state_dict(prefix="further.")
    torch.save(content, checkpoint)
    refused(arguments, tmp_path / "out", "plans.json", "plain nnU-Net")


def test_what_was_found_to_postprocess_goes_along(trained, tmp_path):
    """As in nnU-Net's own export: it is part of what was validated."""
    [trainer], arguments = trained(LABELED_ONLY)
    found = Path(trainer.output_folder).parent / "crossval_results_folds_0"
    found.mkdir()
    for name in ("summary.json", "postprocessing.pkl", "postprocessing.json", "plans.json"):
        (found / name).write_text(name)
    main([*arguments, "-o", str(tmp_path / "out")])
    copied = model_in(tmp_path / "out") / found.name
    assert {file.name: file.read_text() for file in copied.iterdir()} == {
        name: name for name in ("summary.json", "postprocessing.pkl", "postprocessing.json")
    }
