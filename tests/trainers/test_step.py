"""The step: what is trained, what it costs nothing to leave out, and that the orders of passes agree."""

from __future__ import annotations

import pytest
import torch
from helpers.steps import ONE_WITH_SHTA, a_batch, gradients, parameters, stepped, with_stages

TRAINERS = ["nnUNetTrainerLabeledOnly", "nnUNetTrainerCPS", "nnUNetTrainerSHTA_CPS"]


@pytest.mark.parametrize("kind", ["3d", "2d"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_moves_every_parameter(tiny, make_trainer, name, kind):
    trainer = make_trainer(name, tiny(kind), settings={"cps_rampup": 0.0} if "CPS" in name else {})
    before = {n: p.detach().clone() for n, p in parameters(trainer).items()}
    loss = trainer.train_step(a_batch(trainer))["loss"]
    assert loss.isfinite()
    still = [n for n, p in parameters(trainer).items() if torch.equal(p, before[n])]
    assert all("seg_layers.0." in n for n in still), still  # nnU-Net gives the lowest resolution no weight


@pytest.mark.parametrize("method", ["LabeledOnly", "CPS", "ABD", "BCP", "DTC", "AUSS", "MiDSS"])
def test_regions_with_voxels_to_ignore(tiny, make_trainer, method):
    """nnU-Net's target then has one more channel, which says where to ignore."""
    found = stepped(make_trainer(f"nnUNetTrainer{method}", tiny("regions_ignore")))
    assert all(p.isfinite().all() for p in found.values())


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", [*TRAINERS, "nnUNetTrainerGACPS", "nnUNetTrainerMagicNet"])
def test_a_network_of_two_stages_learns(tiny, make_trainer, name):
    """Its only output is also the lowest, whose weight nnU-Net sets to 0 before it makes the weights sum to 1."""
    trainer = make_trainer(name, with_stages(tiny(), 2))
    before = {n: p.detach().clone() for n, p in trainer.plans_network.named_parameters()}
    assert trainer.train_step(a_batch(trainer))["loss"].isfinite()
    for n, p in trainer.plans_network.named_parameters():
        assert p.isfinite().all(), n
        assert not torch.equal(p, before[n]), n


def test_what_is_logged_of_a_step_is_the_sum_over_its_passes(tiny, make_trainer):
    """A term of several passes counts with all its parts, and the loss has the weights."""
    settings = {"cps_weight": 0.3, "cps_rampup": 0.0}
    trainer = make_trainer("nnUNetTrainerCPS", tiny(), settings=settings)
    batch, sums = a_batch(trainer), {}
    passes = list(trainer.losses(trainer._to_device(batch)))
    assert sum("cps" in terms for terms in passes) > 1
    for terms in passes:
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
    again = make_trainer("nnUNetTrainerCPS", tiny(), settings=settings)
    loss, logged = again.train_step(batch)["loss"], again._mean_values()
    for name, value in sums.items():
        assert logged[f"loss_{name}"] == pytest.approx(float(value), rel=1e-4)
    assert float(loss) == pytest.approx(float(sums["sup"] + sums["sup_second"] + 0.3 * sums["cps"]), rel=1e-4)


def plain_gradients(trainer, batch):
    """Cross supervision in the paper's words: all outputs, all terms, one sum, one backward pass."""
    streams, weights = trainer._to_device(batch), trainer.term_weights()
    of_first, of_second = ([trainer.forward(name, stream) for stream in streams] for name in ("first", "second"))
    on_labeled = trainer.settings.cps_on_labeled
    total = weights.get("shta", 0.0) * trainer.take_terms_of_features().get("shta", 0.0)
    for own, others in ((of_first, of_second), (of_second, of_first)):
        total = total + trainer._supervised_loss(own[0], streams.labeled.target)
        for logits, other in list(zip(own, others, strict=True))[0 if on_labeled else 1 :]:
            labels = other[0].argmax(1, keepdim=True).to(torch.int16)
            total = total + (0.5 if on_labeled else 1.0) * weights["cps"] * trainer._cross_loss(logits[0], labels)
    total.backward()
    return {n: p.grad for n, p in parameters(trainer).items()}


@pytest.mark.parametrize("passes", ["paired", "lean", "joint"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nnUNetTrainerCPS", {}),
        ("nnUNetTrainerCPS", {"cps_on_labeled": False}),
        ("nnUNetTrainerCPS", {"preset": "paper"}),
        ("nnUNetTrainerGACPS", {}),
        ("nnUNetTrainerGACPS", {"cps_on_labeled": False}),
        ("nnUNetTrainerSHTA_CPS", {"shta_attach": "all"}),
        ("nnUNetTrainerSHTA_GACPS", {}),
    ],
    ids=str,
)
def test_any_order_of_passes_gives_the_gradients_of_one_plain_pass_bit_for_bit(
    tiny, make_trainer, name, settings, passes
):
    settings = {"cps_rampup": 0.0, **settings}
    expected, found = (
        calculate(trainer, a_batch(trainer))
        for calculate, trainer in (
            (plain_gradients, make_trainer(name, tiny(), settings=settings)),
            (gradients, make_trainer(name, tiny(), settings={**settings, "passes": passes})),
        )
    )
    assert expected.keys() == found.keys()
    assert any(g is not None and g.abs().max() > 0 for n, g in expected.items() if "second" in n)
    for n, gradient in expected.items():
        assert found[n] is gradient is None or torch.equal(found[n], gradient), n


@pytest.mark.parametrize(("passes", "runs"), [("paired", 2), ("lean", 4)])
def test_paired_passes_run_each_network_once_on_each_stream(tiny, make_trainer, passes, runs):
    """So that batch normalization counts an image once."""
    trainer, seen = make_trainer("nnUNetTrainerCPS", tiny(), settings={"passes": passes}), []
    for network in (trainer.plans_network, trainer.training_modules["second"]):
        network.register_forward_hook(lambda network, *_: seen.append(network))
    trainer.train_step(a_batch(trainer))
    assert [seen.count(n) for n in (trainer.plans_network, trainer.training_modules["second"])] == [2, runs]


@pytest.mark.parametrize("name", [n for n in ONE_WITH_SHTA if not n.endswith("CPS")])
def test_where_one_network_learns_paired_passes_are_lean_ones(tiny, make_trainer, name):
    found = []
    for passes in ("paired", "lean"):
        trainer = make_trainer(name, tiny(), settings={"passes": passes})
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        found.append(gradients(trainer, next(trainer.dataloader_train)))
    for n, gradient in found[0].items():
        assert found[1][n] is gradient is None or torch.equal(found[1][n], gradient), n


def test_shta_at_weight_zero_leaves_the_hosts_weights_bit_for_bit(tiny, make_trainer):
    host = make_trainer("nnUNetTrainerCPS", tiny())
    off = make_trainer("nnUNetTrainerSHTA_CPS", tiny(), settings={"shta_weight": 0.0})
    on = make_trainer("nnUNetTrainerSHTA_CPS", tiny())
    for seed in range(2):
        for trainer in (host, off, on):
            trainer.train_step(a_batch(trainer, seed))
    assert parameters(off).keys() == parameters(host).keys()  # no branch at all
    assert all(torch.equal(p, parameters(off)[n]) for n, p in parameters(host).items())
    assert not all(torch.equal(p, parameters(on)[n]) for n, p in parameters(host).items())


def test_one_seed_gives_every_trainer_the_same_first_network_and_the_twin_another(tiny, make_trainer):
    first, cps, shta = (make_trainer(name, tiny()) for name in TRAINERS)
    other = make_trainer("nnUNetTrainerCPS", tiny(), settings={"seed": 1})
    for n, p in first.plans_network.named_parameters():
        assert torch.equal(p, cps.plans_network.get_parameter(n))
        assert torch.equal(p, shta.plans_network.get_parameter(n))
    weight = "encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(first.plans_network.get_parameter(weight), other.plans_network.get_parameter(weight))
    assert not torch.equal(
        cps.plans_network.get_parameter(weight), cps.training_modules["second"].get_parameter(weight)
    )


def test_labeled_only_steps_like_nnunet(tiny, make_trainer):
    """The same weights and the same batch: the same weights after nnU-Net's own step."""
    ours, theirs = make_trainer("nnUNetTrainerLabeledOnly", tiny()), make_trainer("nnUNetTrainer", tiny())
    theirs.network.load_state_dict(ours.network.state_dict())
    for seed in range(2):
        batch = a_batch(ours, seed)
        loss = ours.train_step(batch)["loss"].item()
        assert loss == pytest.approx(theirs.train_step(batch)["loss"].item())
    for n, p in ours.network.named_parameters():
        assert torch.equal(p, theirs.network.get_parameter(n)), n


def test_each_network_is_clipped_by_itself(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_CPS", tiny())
    modules = [trainer.plans_network, *trainer.training_modules.values()]
    for scale, module in zip((1e4, 1e-4, 1e4), modules, strict=True):
        for p in module.parameters():
            p.grad = torch.full_like(p, scale)
    before = [torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in modules]
    trainer._update()
    after = [torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in modules]
    assert after[0].item() == pytest.approx(12, rel=1e-3)
    assert after[1] == before[1] < 12
    assert after[2].item() == pytest.approx(12, rel=1e-3)


def test_proxies_have_no_weight_decay_and_all_else_has_nnunets(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_CPS", tiny())
    decay = {id(p): group["weight_decay"] for group in trainer.training_optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(1 for _ in trainer.training_modules.parameters())
    for n, p in trainer.training_modules.named_parameters():
        assert decay[id(p)] == (0 if n.endswith("proxies") else trainer.weight_decay), n


def test_the_cross_term_is_the_papers_over_both_streams(tiny, make_trainer):
    """CE of each network with the other's argmax, the mean over all labeled and unlabeled voxels."""
    trainer = make_trainer("nnUNetTrainerCPS", tiny(), settings={"cps_loss": "ce"})
    batch = a_batch(trainer)
    images = torch.cat([batch["data"], batch["unlabeled"]])
    with torch.no_grad():
        a, b = (net(images)[0] for net in (trainer.plans_network, trainer.training_modules["second"]))
        expected = sum(torch.nn.functional.cross_entropy(x, y.argmax(1)) for x, y in ((a, b), (b, a)))
    terms = list(trainer.losses(trainer._to_device(batch)))
    assert sum(t["cps"] for t in terms).item() == pytest.approx(expected.item(), rel=1e-5)
    assert [sorted(t) for t in terms] == [["cps", "sup"], ["cps", "sup_second"], ["cps"], ["cps"]]


@pytest.mark.parametrize("kind", ["ignore", "3d"])
def test_pseudo_labels_have_nnunets_loss_which_is_not_asked_what_it_ignores(tiny, make_trainer, kind, monkeypatch):
    trainer = make_trainer("nnUNetTrainerCPS", tiny(kind))
    loss = trainer.full_resolution_loss
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 8, 8, 8).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        logits[1].copy_(logits[0])
    labels = torch.randint(0, 3, (2, 1, 8, 8, 8)).to(torch.int16)
    expected = loss(logits[0], labels)
    if kind == "ignore":  # without asking, nothing can wait for a device
        monkeypatch.setattr(type(loss), "forward", None)
    found = trainer._cross_loss(logits[1], labels)
    assert torch.equal(found, expected)
    for value in (expected, found):
        value.backward()
    assert torch.equal(logits[0].grad, logits[1].grad)


def test_unlabeled_images_never_enter_shta(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_CPS", tiny(), settings={"shta_attach": "all", "cps_weight": 0.0})
    batch = a_batch(trainer)
    seen = []
    for name in ("shta_first", "shta_second"):
        trainer.training_modules[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    trainer.train_step(batch)
    assert len(seen) == 2
    assert all(torch.equal(labels, batch["target"][0]) for labels in seen)


@pytest.mark.parametrize("kind", ["multichannel", "anisotropic", "ignore", "regions", "2d", "png", "resenc"])
@pytest.mark.parametrize("name", TRAINERS[1:])
def test_every_kind_of_data_trains_or_is_refused_in_a_sentence(tiny, make_trainer, name, kind):
    from nnunet_ssl.errors import UserError

    if kind == "regions" and "SHTA" in name:
        with pytest.raises(UserError, match="region-based labels") as error:
            make_trainer(name, tiny(kind))
        assert "nnUNetTrainerCPS" in str(error.value)
        return
    trainer = make_trainer(name, tiny(kind))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
