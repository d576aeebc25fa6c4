"""SHTA on each of its hosts: nothing of it in the host, nothing changed when it is off, every ablation runs."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest
import torch

import nnunet_ssl.trainers as trainers

HOSTS = ["LabeledOnly", "CPS", "GACPS", "URPC", "MagicNet"]
CLUSTER = ("assign", "anchor"), ("hard",), ("center",)  # semantic assignment, hard token refinement, center alignment


def stepped(trainer, steps: int = 2):
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(steps):
        assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
    return dict(trainer.plans_network.named_parameters()) | dict(trainer.training_modules.named_parameters("training"))


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_knows_nothing_of_shta(host):
    cls = getattr(trainers, f"nnUNetTrainer{host}")
    assert "shta" not in inspect.getsource(inspect.getmodule(cls)).lower()
    assert not any("shta" in name for name in cls.Settings.__dataclass_fields__)


@pytest.mark.parametrize("host", HOSTS)
def test_switched_off_it_leaves_the_hosts_weights_bit_for_bit(tiny, make_trainer, host):
    plain = stepped(make_trainer(f"nnUNetTrainer{host}", tiny()))
    off = stepped(make_trainer(f"nnUNetTrainerSHTA_{host}", tiny(), settings={"shta_weight": 0.0}))
    on = stepped(make_trainer(f"nnUNetTrainerSHTA_{host}", tiny()))
    assert plain.keys() == off.keys()
    assert all(torch.equal(p, off[n]) for n, p in plain.items())
    assert not all(torch.equal(p, on[n]) for n, p in plain.items())


@pytest.mark.parametrize("kind", ["2d", "anisotropic", "ignore", "multichannel"])
@pytest.mark.parametrize("host", ["GACPS", "URPC", "MagicNet"])
def test_every_kind_of_data(tiny, make_trainer, host, kind):
    found = stepped(make_trainer(f"nnUNetTrainerSHTA_{host}", tiny(kind)))
    assert all(p.isfinite().all() for p in found.values())


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_the_three_parts_runs(tiny, make_trainer, parts):
    """Table III. A part that is off has no influence; the tokens are as many as with all parts."""
    off = {f"shta_{name}_weight": 0.0 for on, names in zip(parts, CLUSTER, strict=True) if not on for name in names}
    trainer = make_trainer("nnUNetTrainerSHTA_GACPS", tiny(), settings={**off, "shta_matched_hard": True})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    terms = {}
    for passed in trainer.losses(trainer._to_device(next(trainer.dataloader_train))):
        terms |= passed
        terms |= trainer._terms_of_features
    proxies = trainer.training_modules["shta_first"].loss.proxies
    head = [p for n, p in trainer.training_modules["shta_first"].named_parameters() if "proxies" not in n]
    gradients = torch.autograd.grad(terms["shta"], [proxies, *head], allow_unused=True)
    assert all(g is not None for g in gradients)  # on every rank, whatever is on
    assert bool(gradients[0].abs().max() > 0) == (parts[0] or parts[1])  # centers alone teach proxies nothing
    assert any(g.abs().max() > 0 for g in gradients[1:]) == any(parts)


def test_matched_supply_is_the_same_whatever_has_been_learned(tiny, make_trainer):
    """T_conf = 1 excludes every token; matched, the labels alone decide how many are selected."""
    counts = {}
    for matched, threshold in itertools.product((False, True), (0.0, 1.0)):
        settings = {"shta_matched_hard": matched, "shta_conf_threshold": threshold}
        trainer = make_trainer("nnUNetTrainerSHTA_LabeledOnly", tiny(), settings=settings)
        stepped(trainer)
        counts[matched, threshold] = trainer._mean_values()["tokens_hard"]
    assert counts[False, 1.0] == 0
    assert counts[False, 0.0] == counts[True, 0.0] == counts[True, 1.0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["3d", "2d"])
@pytest.mark.parametrize("host", HOSTS)
def test_real_commands(tiny, own_results, run_nnunet, tmp_path: Path, host, configuration):
    dataset = tiny(configuration)
    what = [dataset.id, dataset.configuration, 0, "-p", dataset.plans_name, "-device", "cpu"]
    name = f"nnUNetTrainerSHTA_{host}_2epochs"
    run_nnunet("nnUNetv2_train", *what, "-tr", name, settings={})
    run_nnunet("nnUNetv2_train", *what, "-tr", name, "--val")
    run_nnunet("nnUNetv2_train", *what, "-tr", name, "--c")
    model = ["-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-p", dataset.plans_name, "-tr", name]
    run_nnunet(
        "nnUNetv2_predict", *model, "-i", dataset.raw / "imagesTs", "-o", tmp_path / "out", "-device", "cpu",
        env={"nnUNet_extTrainer": ""},
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
