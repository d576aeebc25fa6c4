"""SHTA on each of its hosts: nothing of it in the host, nothing changed when it is off, every ablation runs."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from helpers.runs import commands_work
from helpers.steps import a_batch, stepped

import nnunet_ssl.trainers as trainers
from nnunet_ssl.errors import UserError

HOSTS = ["LabeledOnly", "CPS", "GACPS", "URPC", "MagicNet"]
CLUSTER = ("assign", "anchor"), ("hard",), ("center",)  # semantic assignment, hard token refinement, center alignment


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


@pytest.mark.parametrize("host", trainers.SHTA_HOSTS)
def test_on_every_host_it_is_called_once_for_each_network_that_has_it_and_teaches_that(tiny, make_trainer, host):
    trainer = make_trainer(f"nnUNetTrainerSHTA_{host}", tiny(), settings={"shta_attach": "all"})
    batch, calls = a_batch(trainer), []
    for name in trainer.networks_with_shta():
        branch = trainer.training_modules[f"shta_{name}"]
        branch.register_forward_pre_hook(lambda _, inputs, name=name: calls.append((name, len(inputs[0]))))
    terms = [passed | trainer.take_terms_of_features() for passed in trainer.losses(trainer._to_device(batch))]
    assert sorted(calls) == [(name, trainer.batch_size) for name in sorted(trainer.networks_with_shta())]
    of_shta = [passed["shta"] for passed in terms if "shta" in passed]
    assert len(of_shta) == len(calls)
    for name in trainer.networks_with_shta():
        learning = [p for p in trainer.networks()[name].parameters() if p.requires_grad]
        taught = torch.autograd.grad(sum(of_shta), learning, allow_unused=True, retain_graph=True)
        assert any(gradient is not None and gradient.any() for gradient in taught), name
    steered = [p for optimizer in trainer._optimizers() for group in optimizer.param_groups for p in group["params"]]
    learning = [*trainer.plans_network.parameters(), *trainer.training_modules.parameters()]
    assert sorted(map(id, steered)) == sorted({id(p) for p in learning if p.requires_grad})


@pytest.mark.parametrize("kind", ["2d", "anisotropic", "ignore", "multichannel"])
@pytest.mark.parametrize("host", ["GACPS", "URPC", "MagicNet"])
def test_every_kind_of_data(tiny, make_trainer, host, kind):
    found = stepped(make_trainer(f"nnUNetTrainerSHTA_{host}", tiny(kind)))
    assert all(p.isfinite().all() for p in found.values())


def test_every_combination_of_the_three_parts_runs(tiny, make_trainer):
    """Table III. A part that is off has no influence; the tokens are as many as with all parts."""
    num_hard = set()
    for parts in itertools.product([False, True], repeat=3):
        off = {f"shta_{name}_weight": 0.0 for on, names in zip(parts, CLUSTER, strict=True) if not on for name in names}
        trainer = make_trainer("nnUNetTrainerSHTA_GACPS", tiny(), settings={**off, "shta_matched_hard": True})
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        terms = {}
        for passed in trainer.losses(trainer._to_device(next(trainer.dataloader_train))):
            terms |= passed
            terms |= trainer._terms_of_features
        num_hard.add(trainer._mean_values()["tokens_hard"])
        proxies = trainer.training_modules["shta_first"].loss.proxies
        head = [p for n, p in trainer.training_modules["shta_first"].named_parameters() if "proxies" not in n]
        gradients = torch.autograd.grad(terms["shta"], [proxies, *head], allow_unused=True)
        assert all(g is not None for g in gradients), parts  # on every rank, whatever is on
        # centers alone teach proxies nothing
        assert bool(gradients[0].abs().max() > 0) == (parts[0] or parts[1]), parts
        assert any(g.abs().max() > 0 for g in gradients[1:]) == any(parts), parts
    assert len(num_hard) == 1
    assert num_hard.pop() > 0


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


def test_the_log_says_how_many_tokens_of_each_class_are_selected(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_LabeledOnly", tiny(), settings={"shta_selection": "per_class"})
    first = next(iter(trainer._foreground_classes.values()))
    trainer.dataset_json["labels"][first] = [trainer.dataset_json["labels"][first]]  # as nnU-Net may be given it
    stepped(trainer)
    values = trainer._mean_values()
    names = list(trainer._foreground_classes.values())
    assert names == [name for name in trainer.dataset_json["labels"] if name != "background"]
    assert sum(values[f"hard_{name}"] for name in names) == pytest.approx(values["tokens_hard"])
    for name in names:
        assert 0.5 * values[f"candidates_{name}"] <= values[f"hard_{name}"] <= 0.5 * values[f"candidates_{name}"] + 1
    assert values["classes_references"] == len(names) + 1
    assert 0 < values["classes_centers"] <= len(names)


# ---------------------------------------------------------------------------------------------------- its own settings

ON_LABELS = "nnUNetTrainerSHTA_LabeledOnly"


def branch_of(trainer):
    return trainer.training_modules["shta_first"]


def test_lambda_grows_linearly_over_the_warmup(tiny, make_trainer):
    trainer = make_trainer(ON_LABELS, tiny(), settings={"shta_weight": 0.4, "shta_warmup": 0.5})
    found = []
    for share in (0, 0.125, 0.25, 0.5, 1):
        trainer.global_step = share * trainer.total_steps
        found.append(trainer.term_weights()["shta"])
    assert found == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert make_trainer(ON_LABELS, tiny(), settings={"shta_weight": 0.4}).term_weights()["shta"] == 0.4


def test_the_stride_is_what_is_asked_for_and_capped_where_it_is_not(tiny, make_trainer):
    def stride(**settings):
        return branch_of(make_trainer(ON_LABELS, tiny(), settings=settings)).stride

    assert stride() == (4, 4, 4)
    assert stride(shta_stride=[2, 4, 8]) == (2, 4, 8)
    assert stride(shta_max_tokens=16) == (8, 8, 8)  # 2 x 2 x 2 tokens of each of two patches


@pytest.mark.parametrize("stride", [[3, 4, 4], [4, 4], [4, 4, 32]])
def test_a_stride_that_does_not_divide_the_patch_is_refused(tiny, make_trainer, stride):
    with pytest.raises(UserError, match=r"shta_stride \[.*\] does not divide the patch \[16, 16, 16\]"):
        make_trainer(ON_LABELS, tiny(), settings={"shta_stride": stride})


@pytest.mark.parametrize(("fraction", "tokens"), [(0.25, 128), (0.5, 96)])
def test_tokens_that_are_mostly_ignored_take_part_only_if_asked_for(tiny, make_trainer, fraction, tokens):
    trainer = make_trainer(ON_LABELS, tiny("ignore"), settings={"shta_min_valid_fraction": fraction})
    branch, batch = branch_of(trainer), a_batch(trainer)
    # four layers of 2 x 16 tokens, each four voxels high; of the first layer one voxel in four is left
    batch["target"][0][:, :, :3] = trainer.label_manager.ignore_label
    seen = []
    branch.loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    trainer.train_step(batch)
    assert (seen[0].sum(1) > 0).sum() == tokens


def test_normalized_embeddings_are_asked_for(tiny, make_trainer):
    for asked in (False, True):
        trainer = make_trainer(ON_LABELS, tiny(), settings={"shta_normalize_embeddings": asked})
        assert branch_of(trainer).loss.settings.shta_normalize_embeddings == asked


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "2d"])
@pytest.mark.parametrize("host", HOSTS)
def test_real_commands(tiny_copy, run_nnunet, tmp_path, host, kind):
    commands_work(tiny_copy(kind), run_nnunet, tmp_path, f"nnUNetTrainerSHTA_{host}_2epochs", {"loss_sup", "loss_shta"})
