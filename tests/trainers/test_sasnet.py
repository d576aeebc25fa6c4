"""SASNet in training: what learns from what, what each part's absence costs, validation of the branches, export."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from helpers.datasets import threads_for_processes
from helpers.runs import assert_resumed_equals_uninterrupted, train
from helpers.steps import a_batch, half_a_step, on_two_ranks, spied, with_stages
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

from nnunet_ssl import trainers
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.sdm import signed_distance_maps
from nnunet_ssl.trainers.sasnet import trainer as sasnet
from nnunet_ssl.trainers.sasnet.coordinates import positions
from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory

NAME = "nnUNetTrainerSASNet"
FULL = {"sasnet_rampup": 0.0}


def started(trainer):
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def parameters(trainer):
    return dict(trainer.plans_network.named_parameters()) | dict(trainer.training_modules.named_parameters("training"))


def gradients(trainer, batch):
    """The gradients of one step, before clipping, by parameter."""
    trainer._update = lambda: None
    trainer.train_step(batch)
    return {n: p.grad for n, p in parameters(trainer).items()}


@pytest.mark.parametrize("kind", ["3d", "2d", "anisotropic", "multichannel", "resenc", "ignore"])
def test_steps_move_every_parameter(tiny, make_trainer, kind):
    trainer = started(make_trainer(NAME, tiny(kind), settings=FULL))
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    for _ in range(2):  # a residual block starts to learn in the second
        assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
    still = [n for n, p in parameters(trainer).items() if torch.equal(p, before[n])]
    assert all(n.startswith("decoder.seg_layers.0.") for n in still), still  # nnU-Net gives it no weight


def test_terms_of_both_streams_count_by_half(tiny, make_trainer, monkeypatch):
    trainer = started(make_trainer(NAME, tiny("2d"), settings=FULL))
    seen = {name: spied(monkeypatch, trainer, name) for name in ("plc", "src")}
    terms = list(trainer.losses(trainer._to_device(next(trainer.dataloader_train))))
    for name, calls in seen.items():
        assert len(calls) == (2 if name == "plc" else 4)  # src for each decoder
        assert sum(of_stream[name].item() for of_stream in terms) == pytest.approx(sum(calls).item() / 2)


def test_unlabeled_images_are_fused_by_the_mean_of_the_branches(tiny, make_trainer):
    """The classes differ where the branches do, so that one of them alone gives others."""
    trainer = started(make_trainer(NAME, tiny("2d"), settings=FULL))
    stream = trainer._to_device(next(trainer.dataloader_train)).unlabeled
    torch.manual_seed(0)
    high, low = (torch.randn(2, 3, 16, 16).softmax(1) for _ in range(2))
    fused = trainer._fused_labels(stream, Branches(high, low))
    assert torch.equal(fused.squeeze(1), (high + low).argmax(1))
    assert not torch.equal(fused.squeeze(1), high.argmax(1))


def test_distances_are_in_the_plans_spacing(tiny, make_trainer):
    trainer = started(make_trainer(NAME, tiny("anisotropic"), settings=FULL))
    stream = trainer._to_device(next(trainer.dataloader_train)).unlabeled
    logits = Branches(*(torch.randn(2, 3, *trainer.configuration_manager.patch_size) for _ in range(2)))
    fused = trainer._fused_labels(stream, Branches(*(x.softmax(1) for x in logits)))
    spacing = trainer.configuration_manager.spacing
    assert len(set(spacing)) > 1
    found, expected, plain = (
        trainer._distance_maps(stream, logits)[0],
        signed_distance_maps(fused, 3, spacing)[0],
        signed_distance_maps(fused, 3, [1.0] * len(spacing))[0],
    )
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain)


def learns(trainer, term: str, batch) -> set[str]:
    """Which parts get a gradient from one term alone."""
    total = sum(terms[term] for terms in trainer.losses(trainer._to_device(batch)) if term in terms)
    named = parameters(trainer)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    with_gradient = {n for n, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
    parts = set()
    for name in with_gradient:
        words = name.split(".")
        parts.add(".".join(words[:2]) if words[0] in ("decoder", "low_decoder", "training") else words[0])
    return parts


def test_which_part_learns_from_which_loss(tiny, make_trainer):
    trainer = started(make_trainer(NAME, tiny(), settings=FULL))
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)  # the regression heads start at zero, and until they move nothing flows through them
    high, low = ({f"{d}.{part}" for part in ("stages", "transpconvs")} for d in ("decoder", "low_decoder"))
    assert all(p.any() for n, p in parameters(trainer).items() if "regression" in n and n.endswith("weight"))
    heads = {"decoder.seg_layers"}, {"low_decoder.seg_layers"}
    assert learns(trainer, "seg_high", batch) == {"encoder"} | high | heads[0]
    assert learns(trainer, "seg_low", batch) == {"encoder"} | low | heads[1]
    assert learns(trainer, "plc", batch) == {"encoder"} | high | low | heads[0] | heads[1]
    regression = {"training.regression_high", "training.regression_low"}
    assert learns(trainer, "src", batch) == {"encoder"} | high | low | regression  # no segmentation head


def terms_of(trainer):
    found = {}
    for terms in trainer.losses(trainer._to_device(next(trainer.dataloader_train))):
        found |= terms
    return set(found)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, {"seg_high", "seg_low", "plc", "src"}),
        ({"sasnet_sar": "running"}, {"seg_high", "seg_low", "plc", "src"}),
        ({"sasnet_sar": "off"}, {"seg_high", "seg_low", "plc", "src"}),
        ({"sasnet_sdm": False}, {"seg_high", "seg_low", "plc"}),
        ({"sasnet_plc": "off"}, {"seg_high", "seg_low", "src"}),
        ({"sasnet_plc": "plain", "sasnet_views": "rotate"}, {"seg_high", "seg_low", "plc", "src"}),
        ({"sasnet_plc": "off", "sasnet_sdm": False}, {"seg_high", "seg_low"}),
        ({"sasnet_low_level_start": 0}, {"seg_high", "src"}),
        ({"sasnet_low_level_start": 0, "sasnet_sdm": False}, {"seg_high"}),
    ],
)
def test_each_part_can_be_switched_off(tiny, make_trainer, settings, terms):
    trainer = started(make_trainer(NAME, tiny(), settings=settings))
    assert terms_of(trainer) == terms
    sar = "src" in terms and "seg_low" in terms and settings.get("sasnet_sar") != "off"
    assert (trainer.memory is not None) == sar
    assert ("coordinates" in next(trainer.dataloader_train)) == sar
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()


def test_with_one_branch_and_labels_alone_it_steps_like_labeled_only(tiny, make_trainer):
    off = {"sasnet_low_level_start": 0, "sasnet_sdm": False, "sasnet_views": "off", "sasnet_beta": 1.0}
    ours, plain = make_trainer(NAME, tiny(), settings=off), make_trainer("nnUNetTrainerLabeledOnly", tiny())
    for trainer in (ours, plain):
        started(trainer)
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
    assert parameters(ours).keys() == parameters(plain).keys()
    assert all(torch.equal(p, parameters(plain)[n]) for n, p in parameters(ours).items())


def test_a_network_of_two_stages_has_one_branch(tiny, make_trainer):
    trainer = started(make_trainer(NAME, with_stages(tiny(), 2), settings=FULL))
    assert terms_of(trainer) == {"seg_high", "src"}
    assert trainer.memory is None
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
    assert "too few for a low-level branch" in Path(trainer.log_file).read_text()
    with pytest.raises(SystemExit, match="sasnet_low_level_start is 2"):
        make_trainer(NAME, with_stages(tiny(), 2), settings={"sasnet_low_level_start": 2})


@pytest.mark.parametrize("start", [1, 2])
def test_the_weights_of_each_branchs_outputs_sum_to_one(tiny, make_trainer, start):
    trainer = make_trainer(
        NAME, with_stages(tiny(), 4), settings={"sasnet_low_level_start": start, "sasnet_sdm": False}
    )
    trainer.memory = None
    trainer.loss.loss.forward = lambda *_: torch.ones(())  # each output's loss, so that the sum is that of the weights
    labeled = trainer._to_device(a_batch(trainer)).labeled
    outputs = trainer.forward("first", labeled)
    assert [len(branch.logits) for branch in outputs] == [3, 3 - start]
    terms = trainer._terms(labeled, outputs)
    assert [terms[f"seg_{name}"].item() for name in ("high", "low")] == pytest.approx([1, 1])
    trainer.enable_deep_supervision, trainer.loss = False, trainer.loss.loss
    assert trainer._segmentation_loss(torch.zeros(1), torch.zeros(1)) == 1


def test_without_views_it_sees_the_labeled_batches_of_every_trainer(tiny, make_trainer):
    ours = started(make_trainer(NAME, tiny(), settings={"sasnet_views": "off"}))
    plain = started(make_trainer("nnUNetTrainerCPS", tiny()))
    for _ in range(3):
        a, b = next(ours.dataloader_train), next(plain.dataloader_train)
        assert torch.equal(a["data"], b["data"])
        assert torch.equal(a["unlabeled"], b["unlabeled"])


@pytest.mark.parametrize("views", ["permute", "rotate"])
def test_views_turn_both_streams(tiny, make_trainer, views):
    ours = started(make_trainer(NAME, tiny(), settings={"sasnet_views": views}))
    plain = started(make_trainer("nnUNetTrainerCPS", tiny()))
    differ = {"data": 0, "unlabeled": 0}
    for _ in range(4):
        a, b = next(ours.dataloader_train), next(plain.dataloader_train)
        for key in differ:
            differ[key] += not torch.equal(a[key], b[key])
    assert min(differ.values()) > 0


@pytest.mark.parametrize(
    ("patch", "spacing", "kind", "said"),
    [
        ([8, 16, 16], [5, 1, 1], TransposeAxesTransform, ""),
        ([8, 24, 16], [5, 1, 1], RandomTransform, "SASNet: no two axes of '3d_fullres' (patch [8, 24, 16], spacing"),
        ([8, 16, 16], [5, 1, 2], type(None), "WARNING: no two axes of '3d_fullres' (patch [8, 16, 16], spacing"),
    ],
)
def test_where_axes_cannot_be_exchanged_views_are_rotated(tiny, make_trainer, capsys, patch, spacing, kind, said):
    trainer = make_trainer(NAME, tiny())
    trainer.configuration_manager.configuration.update(patch_size=patch, spacing=spacing)
    capsys.readouterr()
    assert isinstance(trainer.view_transform(), kind)
    out = capsys.readouterr().out
    assert said in out
    assert bool(out) == bool(said)


def test_a_rotated_patch_annotates_nothing(tiny, make_trainer):
    """What is turned in from outside the patch has the ignore label, not the background's: nobody has annotated it."""
    trainer = make_trainer(NAME, tiny("ignore"), settings={"sasnet_views": "rotate"})
    trainer.configuration_manager.configuration.update(patch_size=[8, 24, 16], spacing=[5, 1, 1])
    transform, ignore = trainer.view_transform(), trainer.label_manager.ignore_label
    segmentation = torch.full((1, 8, 24, 16), ignore, dtype=torch.int16)
    segmentation[:, :, 12, 8] = 1
    for _ in range(5):
        turned = transform(segmentation=segmentation.clone())["segmentation"]
        assert turned.dtype == torch.int16
        assert set(turned.unique().tolist()) == {1, ignore}


def test_ignored_voxels_do_not_count_in_the_log_of_confidence(tiny, make_trainer, monkeypatch):
    """The confidence there is a neutral 0.5, and no label of theirs can be changed."""
    trainer = started(make_trainer(NAME, tiny("ignore"), settings=FULL))
    stream = trainer._to_device(next(trainer.dataloader_train)).labeled
    labels = stream.target[0]
    labels.fill_(trainer.label_manager.ignore_label)
    labels[..., 0] = 1
    prob = torch.zeros(2, 3, *labels.shape[2:])
    prob[:, 1] = 1
    logged = {}
    monkeypatch.setattr(trainer, "log_value", lambda name, value: logged.update({name: float(value)}))
    trainer._fused_labels(stream, Branches(prob, prob))
    assert logged == {"confidence_high": 1, "confidence_low": 1, "sar_changed": 0}


def test_a_network_with_one_decoder_is_refused(tiny, make_trainer, monkeypatch):
    mixed = type("nnUNetTrainerSASNetBN", (nnUNetTrainerBN, trainers.nnUNetTrainerSASNet), {})
    monkeypatch.setattr(trainers, mixed.__name__, mixed, raising=False)
    with pytest.raises(UserError, match="trains a PlainConvUNet, but SASNet needs two decoders"):
        make_trainer(mixed.__name__, tiny())


def test_the_log_says_what_the_memory_costs(tiny, make_trainer, capsys):
    trainer = started(make_trainer(NAME, tiny()))
    seconds = 0.6e-6 * 2 * 16**3
    assert list(trainer.configuration_manager.patch_size) == [16] * 3
    assert f"in RAM. There it takes about {seconds:.2g} s of a step." in capsys.readouterr().out


def test_lean_and_joint_passes_give_the_same_gradients(tiny, make_trainer):
    found = []
    for passes in ("lean", "joint"):
        trainer = started(make_trainer(NAME, tiny(), settings={**FULL, "passes": passes}))
        found.append(gradients(trainer, next(trainer.dataloader_train)))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_classes_give_the_papers_formulas(tiny, make_trainer):
    """Eq. 15 as implemented and Eq. 4-8, written out for a background and a foreground probability."""
    trainer = started(make_trainer(NAME, tiny()))
    rng = torch.Generator().manual_seed(0)
    high, low = (torch.rand(2, 1, 16, 16, 16, generator=rng) for _ in range(2))
    two = [torch.cat([1 - p, p], 1) for p in (high, low)]
    batch = trainer._to_device(next(trainer.dataloader_train))
    target = (torch.rand(2, 1, 16, 16, 16, generator=rng) > 0.5).to(torch.int16)
    stream = batch.labeled._replace(target=[target])
    where = positions(stream.coordinates, (16, 16, 16))
    for _ in range(2):  # the first visit of every voxel, and the second
        before = torch.stack([trainer.memory.read(c, x) for c, x in zip(stream.cases, where, strict=True)])
        fused = trainer._fused_labels(stream, Branches(*two))
        weighted = (1 + 0.5 * before[:, :1]) * high + (1 + 0.5 * before[:, 1:]) * low
        background = (1 + 0.5 * before[:, :1]) * (1 - high) + (1 + 0.5 * before[:, 1:]) * (1 - low)
        expected = torch.softmax(torch.cat([background, weighted], 1), 1)[:, 1] > 0.5  # Eq. 6
        assert torch.equal(fused == 1, expected)
    confidence = (1 - high) * (target == 0) + high * (target == 1)  # Eq. 8
    seen = trainer.memory.read(stream.cases[0], where[0])[0]
    known = ~where[0].isnan().any(0)
    assert stream.cases[0] != stream.cases[1]
    assert torch.corrcoef(torch.stack([seen[known], confidence[0, 0][known]]))[0, 1] > 0.8


def test_ignored_voxels_are_never_remembered(tiny, make_trainer):
    dataset = tiny("ignore")
    trainer = started(make_trainer(NAME, dataset, settings={"sasnet_views": "off"}))
    for _ in range(12):
        trainer.train_step(next(trainer.dataloader_train))
    visited = 0
    for case, values in trainer.memory.state().items():
        _, seg, _, _ = trainer.get_tr_and_val_datasets()[0].load_case(case)
        seen = torch.from_numpy(np.asarray(seg[0])) != 3
        inner = torch.nn.functional.max_pool3d((~seen)[None].float(), 3, 1, 1)[0] == 0  # away from the border
        outer = torch.nn.functional.max_pool3d(seen[None].float(), 3, 1, 1)[0] == 0
        assert (values[:, :, outer] == -1).all()
        visited += (values[:, :, inner] >= 0).float().mean().item()
    assert visited > 0


@pytest.mark.parametrize("constant", [0, 1])
def test_a_patch_of_one_class_has_finite_losses_and_no_boundary(tiny, make_trainer, constant):
    trainer = started(make_trainer(NAME, tiny(), settings=FULL))
    with torch.no_grad():
        for decoder in (trainer.plans_network.decoder, trainer.plans_network.low_decoder):
            decoder.seg_layers[-1].weight.zero_()
            decoder.seg_layers[-1].bias.copy_(100.0 * torch.nn.functional.one_hot(torch.tensor(constant), 3))
    terms = list(trainer.losses(trainer._to_device(next(trainer.dataloader_train))))
    assert all(t.isfinite() for pass_ in terms for t in pass_.values())
    assert all(pass_["src"] == 0 for pass_ in terms)
    sum(t for pass_ in terms for t in pass_.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters(trainer).values())


def test_under_autocast_the_terms_stay_those_of_full_precision(tiny, make_trainer):
    trainer = started(make_trainer(NAME, tiny(), settings={**FULL, "sasnet_sar": "off"}))
    batch = trainer._to_device(next(trainer.dataloader_train))
    plain = list(trainer.losses(batch))
    with torch.autocast("cpu", torch.bfloat16):
        half = list(trainer.losses(batch))
    for a, b in zip(plain, half, strict=True):
        for name in a:
            assert b[name].dtype == torch.float32, name
            torch.testing.assert_close(a[name], b[name], rtol=0.1, atol=0.03, msg=name)


def test_a_memory_on_disk_trains_the_same(tiny, make_trainer):
    found = []
    for share in (1.0, 0.0):
        trainer = started(make_trainer(NAME, tiny(), settings={**FULL, "sasnet_memory_share": share}))
        for _ in range(3):
            trainer.train_step(next(trainer.dataloader_train))
        assert (Path(trainer.output_folder) / "confidence_memory_0").exists() == (share == 0)
        found.append({**parameters(trainer), **trainer.memory.state()})
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


@pytest.mark.parametrize(("bytes_free", "moves"), [(10**9, True), (1000, False)])
def test_the_memory_moves_to_the_gpu_when_a_step_has_taken_what_it_needs(
    tiny, make_trainer, monkeypatch, capsys, bytes_free, moves
):
    """Before the first step a GPU is empty, and says nothing of the room that there will be."""
    moved, asked = [], []
    monkeypatch.setattr(ConfidenceMemory, "to", lambda self, device: moved.append(device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: asked.append(None) or (bytes_free, 10**12))
    trainer = make_trainer(NAME, tiny(), settings=FULL)
    cpu, trainer.device = trainer.device, torch.device("cuda")
    trainer.before_training_state()
    assert trainer.memory.device == cpu
    trainer.device = cpu
    trainer.before_training_state = lambda: None  # done, as for a GPU
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    assert not asked
    for _ in range(2):
        trainer.train_step(batch)
    assert len(asked) == 1
    assert moved == [cpu] * moves
    assert ("stays where it is" in capsys.readouterr().out) != moves


def test_the_memory_is_on_disk_where_the_container_has_little_ram(tiny, make_trainer, monkeypatch):
    trainer = make_trainer(NAME, tiny())
    needed = started(trainer).memory.nbytes
    for limit, on_disk in ((4 * needed, False), (4 * needed - 1, True)):
        monkeypatch.setattr(sasnet, "ram_limit", lambda limit=limit: limit)
        trainer._confidence_memory()
        assert (Path(trainer.output_folder) / "confidence_memory_0").exists() == on_disk


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_resumed_it_ends_with_the_same_weights_and_memory(tiny, make_trainer, kind):
    made = []

    def make():
        made.append(make_trainer(f"{NAME}_3epochs", tiny(kind), settings={"save_every": 1}))
        return made[-1]

    assert_resumed_equals_uninterrupted(make, until=2)
    _, resumed, whole = (trainer.memory.state() for trainer in made)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(t, whole[n]) for n, t in resumed.items())


def test_only_the_latest_checkpoint_carries_the_memory(tiny, make_trainer, capsys):
    trainer = make_trainer(f"{NAME}_3epochs", tiny(), settings={"save_every": 1, "keep_epochs": [1]})
    train(trainer, until=1)
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    carries = {
        file.name: "memory" in torch.load(file, weights_only=True)["method"] for file in folder.glob("*_ssl.pth")
    }
    assert carries == {
        "checkpoint_best_ssl.pth": False,
        "checkpoint_epoch1_ssl.pth": False,
        "checkpoint_final_ssl.pth": False,
        "checkpoint_latest_ssl.pth": True,
    }

    for name, begins_anew in (("best", True), ("latest", False)):
        resumed = make_trainer(f"{NAME}_3epochs", tiny(), settings={"save_every": 1, "keep_epochs": [1]})
        resumed.load_checkpoint(str(folder / f"checkpoint_{name}.pth"))
        resumed.on_train_start()
        assert all((values == -1).all() for values in resumed.memory.state().values()) == begins_anew
        assert ("so it starts empty" in capsys.readouterr().out) == begins_anew


def test_a_memory_of_other_cases_is_a_sentence(tiny, make_trainer):
    trainer = started(make_trainer(NAME, tiny()))
    state = trainer.training_state("checkpoint_latest.pth")
    state["memory"]["another"] = state["memory"].pop(next(iter(state["memory"])))
    with pytest.raises(SystemExit, match="start again without --c"):
        trainer.load_training_state(state)


def test_a_branch_alone_scores_what_it_predicts(tiny, make_trainer):
    """tp, fp and fn of nnU-Net's validation step, for a low-level branch that is always wrong."""
    trainer = started(make_trainer(NAME, tiny()))
    trainer.on_validation_epoch_start()
    batch = next(trainer.dataloader_val)
    with torch.no_grad():
        low = trainer.plans_network.low_decoder.seg_layers[-1]
        low.weight.zero_()
        low.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))  # background everywhere
        outputs = trainer.validation_step(batch)
        trainer.plans_network.branch = "high"
        expected = trainer.network(batch["data"])[0].argmax(1)
    assert (outputs["tp_hard_low"] == 0).all()
    assert (outputs["fp_hard_low"] == 0).all()
    target = batch["target"][0][:, 0]
    for k in (1, 2):
        assert outputs["fn_hard_low"][k - 1] == (target == k).sum()
        assert outputs["tp_hard_high"][k - 1] == ((target == k) & (expected == k)).sum()


def test_validation_logs_both_branches_alone_and_together(tiny, make_trainer):
    trainer = make_trainer(f"{NAME}_1epochs", tiny("ignore"), settings={"sasnet_validate_branches": True})
    train(trainer)
    trainer.inference_allowed_mirroring_axes = None  # an eighth of the time
    with threads_for_processes():
        trainer.perform_actual_validation()
    columns = (Path(trainer.output_folder) / "ssl_log.csv").read_text().splitlines()[0].split(",")
    assert {"dice_high", "dice_low", "dice_both", "sar_changed", "confidence_high", "confidence_low"} <= set(columns)
    for folder in ("validation", "validation_high", "validation_low"):
        assert (Path(trainer.output_folder) / folder / "summary.json").is_file()
    [log] = Path(trainer.output_folder).glob("training_log*")
    assert "Validation Dice: high" in log.read_text()


@pytest.mark.parametrize("branches", [False, True])
def test_final_validation_exports_to_the_next_stage_once(tiny, make_trainer, monkeypatch, branches):
    trainer = make_trainer(NAME, tiny(), settings={"sasnet_validate_branches": branches})
    trainer.configuration_manager.configuration["next_stage"] = "3d_cascade_fullres"
    done = []

    def validation(self, save_probabilities):
        branch, folder = self.plans_network.branch, Path(self.output_folder) / "validation"
        done.append((branch, self.configuration_manager.next_stage_names, save_probabilities))
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"foreground_mean": {"Dice": 0.5}}')

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validation)
    trainer.perform_actual_validation(True)
    alone = [("high", None, False), ("low", None, False)] if branches else []
    assert done == [*alone, ("both", ["3d_cascade_fullres"], True)]


def test_compiled_networks_give_the_same_gradients(tiny, make_trainer, monkeypatch):
    plain = started(make_trainer(NAME, tiny("2d"), settings=FULL))
    batch = next(plain.dataloader_train)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(type(plain), "_do_i_compile", lambda self: True)
    compiled = started(make_trainer(NAME, tiny("2d"), settings=FULL))
    assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
    expected, found = (gradients(trainer, batch) for trainer in (plain, compiled))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        if gradient is None:  # of the lowest resolution's head
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert compiled.plans_network.state_dict().keys() == plain.plans_network.state_dict().keys()


def test_two_ranks_with_half_a_batch_step_like_one_with_all_of_it(tiny, make_trainer, tmp_path):
    """Without distance maps, whose mean is over the classes that a rank happens to see."""
    settings = {**FULL, "sasnet_sdm": False}
    together, apart = (started(make_trainer(NAME, tiny(), settings=settings)) for _ in range(2))
    batch = a_batch(together)
    ranks = on_two_ranks(tmp_path, half_a_step, apart, batch)
    together.train_step(batch)
    for name, p in parameters(together).items():
        torch.testing.assert_close(ranks[0]["weights"][name], p.detach(), rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])


def test_the_labeled_loader_is_nnunets_where_nothing_asks_for_coordinates(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"sasnet_sar": "off"})
    assert trainer.labeled_loader() is nnUNetDataLoader


def test_regions_are_refused(tiny, make_trainer):
    with pytest.raises(SystemExit, match="region"):
        make_trainer(NAME, tiny("regions"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_real_commands_train_continue_validate_predict_and_export(tiny, own_results, run_nnunet, tmp_path, kind):
    from nnunet_ssl.commands.export import main

    dataset = tiny(kind)
    trainer = f"{NAME}_1epochs"
    what = [dataset.id, dataset.configuration, 0, "-p", dataset.plans_name, "-tr", trainer, "-device", "cpu"]
    settings = {"sasnet_low_level_start": 0} if kind == "2d" else {}
    run_nnunet("nnUNetv2_train", *what, settings=settings)
    run_nnunet("nnUNetv2_train", *what, "--c", "--npz")
    assert len(list(own_results.glob(f"*/{trainer}__*/fold_0/validation/*.npz"))) == 1
    run_nnunet("nnUNetv2_train", *what, "--val")  # without the settings of the training
    assert len(list(own_results.glob(f"*/{trainer}__*/fold_0/validation/*.npz"))) == 1  # what is there stays
    model = ["-d", dataset.id, "-c", dataset.configuration, "-f", 0, "-p", dataset.plans_name, "-tr", trainer]
    images = ["-i", dataset.raw / "imagesTs", "-device", "cpu", "--disable_tta", "--save_probabilities"]
    run_nnunet("nnUNetv2_predict", *model, *images, "-o", tmp_path / "both", "-npp", 0, "-nps", 0)
    assert len(list((tmp_path / "both").glob(f"*{dataset.recipe.file_ending}"))) == 2

    main([*map(str, model), "-o", str(tmp_path / "high"), "--branch", "high"])
    [plain] = (tmp_path / "high").glob("Dataset*/nnUNetTrainer__*")
    run_nnunet(
        "nnUNetv2_predict_from_modelfolder", "-m", plain, "-f", 0, *images, "-o", tmp_path / "out",
        "-npp", 1, "-nps", 1, env={"nnUNet_extTrainer": ""},
    )  # fmt: skip
    case = dataset.cases("imagesTs")[0]
    both, high = (np.load(tmp_path / folder / f"{case}.npz")["probabilities"] for folder in ("both", "out"))
    assert np.array_equal(both, high) == (kind == "2d")  # there, without a low-level branch, both are one


def test_the_low_branch_alone_cannot_be_exported(tiny, make_trainer, tmp_path):
    from nnunet_ssl.commands.export import main

    trainer = make_trainer(f"{NAME}_1epochs", tiny())
    train(trainer)
    arguments = ["-d", str(tiny().id), "-c", "3d_fullres", "-f", "0", "-tr", f"{NAME}_1epochs"]
    with pytest.raises(SystemExit, match="--branch high"):
        main([*arguments, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main([*arguments, "-o", str(tmp_path / "out"), "--branch", "low"])
    assert not (tmp_path / "out").exists()
    main([*arguments, "-o", str(tmp_path / "out"), "--branch", "high"])
    [file] = (tmp_path / "out").rglob("checkpoint_final.pth")
    weights = torch.load(file, weights_only=True)["network_weights"]
    assert not any(name.startswith("low_decoder") for name in weights)


def test_a_fold_that_cannot_train_is_refused_before_there_is_a_memory(tiny_copy, make_trainer):
    dataset = tiny_copy("3d")
    (dataset.preprocessed / "splits_final.json").write_text('[{"train": ["tr_00", "nobody"], "val": ["tr_01"]}]')
    trainer = make_trainer(NAME, dataset)
    with pytest.raises(UserError, match="fold 0 names nobody"):
        trainer.on_train_start()
    assert trainer.memory is None
