"""ABD: who sees which view, which cells change places with which labels, and the orders of passes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.runs import assert_resumed_equals_uninterrupted, commands_work
from helpers.steps import a_batch, gradients, stepped

from nnunet_ssl.losses.cubes import partition
from nnunet_ssl.losses.displacement import CellScores
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown

NAME = "nnUNetTrainerABD"
PLAIN = {"strong_jitter": 0, "strong_blur": 0, "strong_noise": 0}
TERMS = {"loss_sup", "loss_sup_second", "loss_displaced", "loss_cps"}


def passes_of(trainer, batch):
    """For each forward the network and its images; the terms."""
    torch.manual_seed(0)
    seen, forward = [], trainer.forward
    trainer.forward = lambda name, stream: seen.append((name, stream.images)) or forward(name, stream)
    terms = list(trainer.losses(trainer._to_device(batch)))
    trainer.forward = forward
    return seen, terms


@pytest.mark.parametrize("kind", ["3d", "2d", "multichannel", "anisotropic", "ignore", "regions", "resenc"])
def test_every_kind_of_data_trains_and_its_terms_are_logged(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    stepped(trainer)
    assert set(trainer._mean_values()) == TERMS | {"weight_cps", "weight_displaced"}


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_both_networks_learn_and_the_order_of_passes_is_no_matter(tiny, make_trainer, kind):
    found = {}
    for passes in ("paired", "lean", "joint"):
        trainer = make_trainer(NAME, tiny(kind), settings={"passes": passes, "cps_rampup": 0})
        torch.manual_seed(0)
        found[passes] = gradients(trainer, a_batch(trainer))
    for parameter, gradient in found["paired"].items():
        if "seg_layers.0" not in parameter:
            assert gradient.abs().sum() > 0, parameter
            for other in ("lean", "joint"):
                torch.testing.assert_close(found[other][parameter], gradient)


def test_the_first_network_sees_weak_views_the_second_strong_ones_and_both_the_displaced(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"strong_jitter": 1})
    batch = a_batch(trainer)
    seen, terms = passes_of(trainer, batch)
    assert [list(of_pass) for of_pass in terms] == [["sup"], ["sup_second"], *[["displaced"]] * 4, *[["cps"]] * 6]
    labeled, displaced, unlabeled, moved = seen[:2], seen[2:6], seen[6:8], seen[8:]
    for (weak, strong), images in ((labeled, batch["data"]), (reversed(unlabeled), batch["unlabeled"])):
        assert (weak[0], strong[0]) == ("first", "second")
        assert torch.equal(weak[1], images)
        assert not torch.equal(strong[1], images)
    for pairs in (displaced, moved):
        for one, other in (pairs[:2], pairs[2:]):
            assert {one[0], other[0]} == {"first", "second"}
            assert torch.equal(one[1], other[1])


def test_of_an_unlabeled_image_one_cell_of_each_view_comes_from_the_other(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"strong_jitter": 1})
    seen, _ = passes_of(trainer, a_batch(trainer))
    strong, weak = (partition(images, trainer.cells) for _, images in seen[6:8])
    first, second = (partition(seen[i][1], trainer.cells) for i in (8, 10))
    for b in range(2):
        changed = (first[b] != weak[b]).flatten(1).any(1)
        assert changed.sum() == 1
        assert any(torch.equal(first[b, changed][0], cell) for cell in strong[b])
        changed = (second[b] != strong[b]).flatten(1).any(1)
        assert changed.sum() == 1
        assert any(torch.equal(second[b, changed][0], cell) for cell in first[b])  # of the displaced one


def test_labels_move_with_their_cells(tiny, make_trainer):
    """Images that are their labels stay so, at every resolution of the target; the ignore label moves too."""
    trainer = make_trainer(NAME, tiny("ignore"), settings=PLAIN | {"abd_labeled_probability": 1})
    target = torch.randint(0, 4, (2, 1, 16, 16, 16)).short()
    batch = a_batch(trainer) | {"data": target.float(), "target": trainer._scaled(target)}
    seen, losses = [], trainer.loss
    trainer.loss = lambda outputs, targets: seen.append(targets) or losses(outputs, targets)
    images, _ = passes_of(trainer, batch)
    assert len(seen) == 6
    for (_, moved), targets in zip(images[2:6], seen[2:], strict=True):
        assert torch.equal(moved, targets[0].float())
        assert not torch.equal(moved, batch["data"])
        scaled = torch.nn.functional.interpolate(moved, targets[1].shape[2:], mode="nearest-exact")
        assert torch.equal(scaled, targets[1].float())
        assert targets[1].dtype == target.dtype
        cells, before = partition(moved, trainer.cells), partition(batch["data"], trainer.cells)
        assert ((cells != before).flatten(2).any(2).sum(1) <= 1).all()


def test_labeled_images_are_displaced_by_a_coin_and_for_a_share_of_the_training(tiny, make_trainer):
    trainer = make_trainer(NAME, tiny(), settings={"abd_labeled_share": 0.5, "abd_labeled_probability": 0.0})
    batch = a_batch(trainer)
    seen, _ = passes_of(trainer, batch)
    assert torch.equal(seen[2][1], batch["data"])
    assert trainer.term_weights()["displaced"] == 2
    trainer.global_step = trainer.total_steps // 2
    _, terms = passes_of(trainer, batch)
    assert not any("displaced" in of_pass for of_pass in terms)
    assert trainer.term_weights()["displaced"] == 0


@pytest.mark.parametrize("kind", ["3d", "regions"])
def test_the_cross_term_is_the_dice_of_the_other_networks_decision_on_its_view(tiny, make_trainer, kind):
    trainer = make_trainer(NAME, tiny(kind))
    batch, regions = a_batch(trainer), kind == "regions"
    seen, terms = passes_of(trainer, batch)
    networks = {"first": trainer.plans_network, "second": trainer.training_modules["second"]}
    with torch.no_grad():
        logits = {name: networks[name](images)[0] for name, images in seen[6:8]}
    labels = {name: x > 0 if regions else x.argmax(1, keepdim=True) for name, x in logits.items()}
    for of_pass, name, other in ((terms[6], "first", "second"), (terms[7], "second", "first")):
        expected = squared_dice_of_shown(logits[name], labels[other], regions=regions)
        torch.testing.assert_close(of_pass["cps"].detach(), expected)


def test_a_term_of_displaced_images_is_the_mean_over_both_views(tiny, make_trainer):
    """Where nothing is displaced, it is the term of images as they are."""
    trainer = make_trainer(NAME, tiny(), settings=PLAIN | {"abd_labeled_probability": 0})
    _, terms = passes_of(trainer, a_batch(trainer))
    of_labels = terms[0]["sup"] + terms[1]["sup_second"]
    torch.testing.assert_close(sum(of_pass["displaced"] for of_pass in terms[2:6]), of_labels)
    trainer._displaced_unlabeled = lambda views: list(views.values())
    _, terms = passes_of(trainer, a_batch(trainer))
    torch.testing.assert_close(sum(of_pass["cps"] for of_pass in terms[8:]), terms[6]["cps"] + terms[7]["cps"])


def test_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tiny, make_trainer):
    settings = {"save_every": 1, "cps_rampup": 0, "seed": 3}
    assert_resumed_equals_uninterrupted(lambda: make_trainer(f"{NAME}_2epochs", tiny(), settings=settings))


def test_the_surest_cell_gives_way_to_the_least_sure_of_the_other_view_in_turn(tiny, make_trainer):
    """Of labeled images; the second view takes from the first as it has become. Of unlabeled ones the least sure."""
    trainer = make_trainer(NAME, tiny("2d"), settings={"abd_labeled_probability": 1.0})
    patch, number = trainer.configuration_manager.patch_size, math.prod(trainer.cells)
    views = {name: torch.randn(2, 1, *patch) for name in ("first", "second")}
    confidence = {name: torch.stack([torch.randperm(number) for _ in range(2)]).float() for name in views}
    trainer._sure = {name: CellScores(confidence[name], torch.randn(2, number, 3)) for name in views}
    cells = {name: partition(images, trainer.cells) for name, images in views.items()}

    displaced = trainer._displaced_labeled(views, torch.zeros(2, 1, *patch, dtype=torch.int16))
    first, second = (partition(images, trainer.cells) for images, _ in displaced)
    for b in range(2):
        most = {name: c[b].argmax() for name, c in confidence.items()}
        least = {name: c[b].argmin() for name, c in confidence.items()}
        expected = cells["first"][b].clone()
        expected[most["first"]] = cells["second"][b, least["second"]]
        assert torch.equal(first[b], expected)
        other = cells["second"][b].clone()
        other[most["second"]] = expected[least["first"]]
        assert torch.equal(second[b], other)

    for name, images in zip(views, trainer._displaced_unlabeled(views), strict=True):
        changed = (partition(images, trainer.cells) != cells[name]).flatten(2).any(2)
        assert [row.nonzero().item() for row in changed] == confidence[name].argmin(1).tolist()


@pytest.mark.slow
def test_nnunets_commands_train_continue_validate_and_predict(tiny_copy, run_nnunet, tmp_path):
    commands_work(tiny_copy("3d"), run_nnunet, tmp_path, f"{NAME}_2epochs", TERMS)
