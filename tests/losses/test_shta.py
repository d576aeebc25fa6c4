"""SHTA's losses against slow oracles written from the equations, and what must hold whatever the numbers are."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from nnunet_ssl.losses.shta import (
    SHTALoss,
    SHTALossSettings,
    SHTATerms,
    confidence_logit,
    token_class_distribution,
    top_share,
)

LOSSES = SHTATerms._fields[:5]


def shta_loss(num_classes, embedding_dim, **settings):
    return SHTALoss(
        num_classes, embedding_dim, SHTALossSettings(**{f"shta_{name}": value for name, value in settings.items()})
    )


# ------------------------------------------------------------------------------------------- token_class_distribution


@pytest.mark.parametrize("num_classes", [2, 14])
@pytest.mark.parametrize(
    ("spatial", "stride"), [((8, 6), (2, 3)), ((6, 4, 8), (3, 2, 4)), ((4, 8, 8), (1, 4, 4)), ((4, 4), (4, 4))]
)
def test_shares_equal_counting_by_hand(spatial, stride, num_classes):
    labels = torch.randint(0, num_classes, (2, *spatial), dtype=torch.int16)
    shares, valid = token_class_distribution(labels, stride, num_classes)
    grid = [n // s for n, s in zip(spatial, stride, strict=True)]
    assert shares.dtype == torch.float32
    assert valid.all()
    for b in range(2):
        for i, token in enumerate(torch.cartesian_prod(*[torch.arange(g) for g in grid]).tolist()):  # C order
            box = labels[b][tuple(slice(t * s, (t + 1) * s) for t, s in zip(token, stride, strict=True))]
            for k in range(num_classes):
                assert shares[b, i, k] == pytest.approx((box == k).float().mean().item())


def test_tokens_are_in_the_order_of_pooled_features():
    labels = torch.randint(0, 5, (2, 8, 4, 6))
    shares, _ = token_class_distribution(labels, (4, 2, 3), 5)
    one_hot = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).float()
    pooled = torch.nn.functional.avg_pool3d(one_hot, (4, 2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(shares, pooled)


def test_ignored_voxels_are_not_counted_and_mostly_ignored_tokens_are_not_valid():
    labels = torch.tensor([[[0, 1, 9, 9], [1, 9, 9, 2], [9, 9, 0, 0], [9, 9, 0, 9]]])
    shares, valid = token_class_distribution(labels, (2, 2), 3, ignore_label=9)
    assert valid.tolist() == [[True, False, False, True]]
    torch.testing.assert_close(shares[0, 0], torch.tensor([1 / 3, 2 / 3, 0]))
    assert shares[0, 3].tolist() == [1, 0, 0]
    assert shares[0, 1:3].sum() == 0


@pytest.mark.parametrize(
    ("fraction", "valid"),
    [
        (0.0, [True, True, False, True]),  # without a single voxel there is nothing to count
        (0.25, [True, True, False, True]),
        (0.75, [True, False, False, True]),
        (0.8, [False, False, False, False]),
    ],
)
def test_how_many_voxels_a_token_needs(fraction, valid):
    labels = torch.tensor([[[0, 1, 9, 9], [1, 9, 9, 2], [9, 9, 0, 0], [9, 9, 0, 9]]])
    shares, found = token_class_distribution(labels, (2, 2), 3, ignore_label=9, min_valid_fraction=fraction)
    assert found[0].tolist() == valid
    assert shares[0].sum(1).tolist() == pytest.approx([float(v) for v in valid])


def test_padding_counts_as_background():
    shares, valid = token_class_distribution(torch.full((1, 2, 2), -1), (2, 2), 3)
    assert valid.item()
    assert shares[0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("ignore_label", [None, 9])
@pytest.mark.parametrize("label", [3, 4])
def test_a_label_out_of_range_is_an_error_and_not_ignored(label, ignore_label):
    with pytest.raises(RuntimeError):
        token_class_distribution(torch.full((1, 2, 2), label), (2, 2), 3, ignore_label)


@pytest.mark.parametrize("stride", [(3, 2), (2,), (2, 2, 2)])
def test_a_stride_that_does_not_fit_is_refused(stride):
    with pytest.raises(ValueError, match="does not divide"):
        token_class_distribution(torch.zeros(1, 8, 8, dtype=torch.long), stride, 2)


# ---------------------------------------------------------------------------------------------------------- SHTALoss


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def oracle(loss, z, y):
    """Eq. 3 to 11, token by token and class by class."""
    num_tokens, num_classes = y.shape
    mu, omega = loss.proxies.detach(), [i for i in range(num_tokens) if y[i].sum() > 0]
    q = {}
    for i in omega:
        scores = [cosine(z[i], mu[k]) / loss.temperature for k in range(num_classes)]  # 3
        total = sum(math.exp(s) for s in scores)
        q[i] = [math.exp(s) / total for s in scores]
    mass = [sum(y[i, k].item() for i in omega) for k in range(num_classes)]
    c = [sum(y[i, k] * z[i] for i in omega) / (mass[k] + 1e-6) if omega else None for k in range(num_classes)]  # 4
    present = [k for k in range(num_classes) if mass[k] > loss.settings.shta_min_class_mass]
    mean = lambda values: sum(values) / len(values) if values else 0.0  # noqa: E731
    assign = mean([-sum(y[i, k].item() * math.log(q[i][k]) for k in range(num_classes)) for i in omega])  # 5
    anchor = mean([1 - cosine(c[k], mu[k]) for k in present])
    candidates = [
        i
        for i in omega
        if max(q[i]) >= loss.settings.shta_conf_threshold
        and y[i, 1:].sum() >= loss.settings.shta_fg_threshold
        and y[i, 1:].max() >= loss.settings.shta_purity_threshold
    ]  # 6, 7
    wanted = math.ceil(round(loss.settings.shta_hard_ratio * len(candidates), 6))
    hard_set = sorted(candidates, key=lambda i: -max(q[i]))[:wanted]
    label = {i: 1 + y[i, 1:].argmax().item() for i in hard_set}  # 8
    hard = mean([-math.log(q[i][label[i]]) for i in hard_set])
    groups = {k: [z[i] for i in hard_set if label[i] == k] for k in range(1, num_classes)}
    centers = {k: sum(g) / len(g) for k, g in groups.items() if g}  # 9
    center = mean([1 - cosine(centers[k], c[k]) for k in centers])  # 10
    weights = (
        loss.settings.shta_assign_weight,
        loss.settings.shta_anchor_weight,
        loss.settings.shta_hard_weight,
        loss.settings.shta_center_weight,
    )
    gap = mean([(F.normalize(centers[k], dim=0) - F.normalize(c[k], dim=0)).norm().item() for k in centers])
    total = sum(w * term for w, term in zip(weights, (assign, anchor, hard, center), strict=True))  # 11
    return {
        "assign": assign, "anchor": anchor, "hard": hard, "center": center, "total": total,
        "num_candidates": len(candidates), "num_hard": len(hard_set), "hard_share": len(hard_set) / max(1, len(omega)),
        "num_references": len(present), "num_centers": len(centers), "center_gap": gap,
        "candidate_share": len(candidates) / max(1, len(omega)),
        "token_accuracy": mean([float(q[i].index(max(q[i])) == y[i].argmax().item()) for i in omega]),
        "proxy_cosine": mean([cosine(c[k], mu[k]) for k in present]),
        "candidates_of_class": [sum(k and 1 + y[i, 1:].argmax() == k for i in candidates) for k in range(num_classes)],
        "hard_of_class": [sum(k and label[i] == k for i in hard_set) for k in range(num_classes)],
    }  # fmt: skip


def some_tokens(num_classes, num_tokens=60, dim=8, absent=(), seed=0):
    """Embeddings, and shares that are pure, mixed or, for some tokens, empty."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, dim, generator=generator)
    y = torch.rand(num_tokens, num_classes, generator=generator) ** 6
    y[:, list(absent)] = 0
    y[::7] = 0
    y[::7, 0] = 1  # pure background
    y = y / y.sum(1, keepdim=True)
    y[5::11] = 0  # outside of Omega_l
    return z, y


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conf_threshold": 0.3, "hard_ratio": 0.1, "temperature": 0.5},
        {"fg_threshold": 0.9, "purity_threshold": 0.1},
        {"hard_ratio": 1.0, "assign_weight": 0.3, "anchor_weight": 2.0, "hard_weight": 0.5, "center_weight": 0.0},
        {"min_class_mass": 5.0},
    ],
)
@pytest.mark.parametrize(("num_classes", "absent"), [(2, ()), (5, (2, 4)), (14, (1, 7))])
def test_losses_equal_the_oracle(num_classes, absent, settings):
    loss = shta_loss(num_classes, 8, **settings)
    z, y = some_tokens(num_classes, absent=absent)
    expected = oracle(loss, z, y)
    terms = loss(z, y)
    of_class = {name: expected.pop(name) for name in ("candidates_of_class", "hard_of_class")}
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value, abs=2e-5), name
    for name, counts in of_class.items():
        assert getattr(terms, name).tolist() == counts, name


def test_the_settings_in_force_are_attributes():
    loss = shta_loss(3, 4, temperature=0.2, hard_ratio=0.25)
    assert (loss.temperature, loss.settings.shta_hard_ratio) == (0.2, 0.25)
    assert (
        loss.settings.shta_conf_threshold,
        loss.settings.shta_fg_threshold,
        loss.settings.shta_purity_threshold,
    ) == (0.0, 0.5, 0.5)
    assert [
        loss.settings.shta_assign_weight,
        loss.settings.shta_anchor_weight,
        loss.settings.shta_hard_weight,
        loss.settings.shta_center_weight,
    ] == [1, 1, 1, 1]
    assert loss.proxies.shape == (3, 4)
    torch.testing.assert_close(loss.proxies.norm(dim=1), torch.ones(3))


def test_the_order_of_tokens_does_not_matter():
    loss, (z, y) = shta_loss(5, 8), some_tokens(5)
    order = torch.randperm(len(z))
    for a, b in zip(loss(z, y), loss(z[order], y[order]), strict=True):
        torch.testing.assert_close(a, b)


def test_perfect_embeddings_of_pure_tokens_leave_nothing_to_lose():
    loss = shta_loss(4, 4, temperature=0.05)
    loss.proxies.data = torch.eye(4)
    labels = torch.arange(4).repeat(10)
    terms = loss(torch.eye(4)[labels], torch.nn.functional.one_hot(labels, 4).float())
    for name in LOSSES:
        assert getattr(terms, name).item() == pytest.approx(0, abs=1e-5)
    assert terms.token_accuracy == 1
    assert terms.proxy_cosine.item() == pytest.approx(1)


def test_the_length_of_embeddings_and_proxies_is_irrelevant_to_assignment():
    loss, (z, y) = shta_loss(5, 8), some_tokens(5)
    before = loss(z, y)
    loss.proxies.data *= 3
    after = loss(z * 7, y)
    for name in LOSSES:
        torch.testing.assert_close(getattr(before, name), getattr(after, name), rtol=1e-4, atol=1e-5)


def test_most_confident_candidates_are_taken():
    mask = torch.tensor([True, False, True, True, True])
    score = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7])
    assert top_share(mask, score, 0.5).tolist() == [False, False, True, False, True]
    assert top_share(mask, score, 0.01).sum() == 1  # at least one
    assert top_share(torch.zeros(5, dtype=torch.bool), score, 0.5).sum() == 0
    assert top_share(torch.ones(30, dtype=torch.bool), torch.rand(30), 0.1).sum() == 3  # not 4 by rounding
    for share in (0.00004, 1e-7, 1e-300):
        assert top_share(torch.ones(30, dtype=torch.bool), torch.rand(30), share).sum() == 1


@pytest.mark.parametrize("num_classes", [2, 14])
def test_the_logit_of_the_confidence_is_that_of_the_largest_probability(num_classes):
    s = 4 * torch.randn(50, num_classes)
    torch.testing.assert_close(confidence_logit(s).sigmoid(), s.softmax(1).amax(1))


def test_saturated_tokens_are_ranked_and_not_taken_from_the_first_image():
    """Two classes at a small temperature: h is exactly 1 for all tokens, and the surest are of the second image."""
    loss = shta_loss(2, 2, temperature=0.02, hard_ratio=0.25)
    loss.proxies.data = torch.eye(2)
    angle = torch.cat([torch.linspace(0.2, 0.4, 20), torch.linspace(0.0, 0.1, 20)])  # of two images, from the proxy
    z = torch.stack([angle.sin(), angle.cos()], 1)
    y = torch.tensor([[0.0, 1.0]]).expand(40, 2)
    assert (loss.log_assignment(z).exp().amax(1) == 1).all()
    center, reference = z[20:30].mean(0), z.mean(0)  # of the smallest angles, which are the surest; and of all
    terms = loss(z, y)
    assert terms.hard_of_class.tolist() == [0, 10]
    gap = (F.normalize(center, dim=0) - F.normalize(reference, dim=0)).norm()
    assert terms.center_gap.item() == pytest.approx(gap.item(), rel=1e-3)
    for others in (z[:10], z[10:20], z[30:]):
        assert abs((F.normalize(others.mean(0), dim=0) - F.normalize(reference, dim=0)).norm() - gap) > 0.01


def test_who_is_eligible_follows_from_the_shares_alone():
    shares = torch.tensor([[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0.3, 0.2, 0.5], [0.2, 0.4, 0.4], [0, 0, 0]])
    mask, dominant = shta_loss(3, 4, fg_threshold=0.6).eligible(shares)
    assert mask.tolist() == [False, True, False, True, False, False]
    assert dominant[mask].tolist() == [2, 2]
    assert shta_loss(3, 4, purity_threshold=0.4).eligible(shares)[0].tolist() == [False, True, True, True, True, False]
    assert not shta_loss(3, 4, fg_threshold=0, purity_threshold=0).eligible(shares)[0][5]


def test_the_assignment_is_a_softmax_of_cosines():
    loss, (z, _) = shta_loss(3, 8), some_tokens(3)
    q = loss.log_assignment(z).exp()
    for i in range(len(z)):
        odds = [math.exp(cosine(z[i], mu) / loss.temperature) for mu in loss.proxies.detach()]
        torch.testing.assert_close(q[i], torch.tensor(odds) / sum(odds))


def test_a_quota_per_class_gives_every_class_its_share():
    z, y = some_tokens(4, num_tokens=200)
    loss = shta_loss(4, 8, selection="per_class", hard_ratio=0.5)
    dominant = 1 + y[:, 1:].argmax(1)
    eligible = (y[:, 1:].sum(1) >= 0.5) & (y[:, 1:].max(1)[0] >= 0.5)
    expected = sum(math.ceil(0.5 * (eligible & (dominant == k)).sum().item()) for k in (1, 2, 3))
    assert loss(z, y).num_hard == expected


def gradients_of(loss, term, z, y):
    z = z.clone().requires_grad_()
    loss.zero_grad()
    getattr(loss(z, y), term).backward()
    reach = lambda g: g is not None and bool(g.abs().max() > 1e-9)  # noqa: E731
    return reach(z.grad), reach(loss.proxies.grad)


@pytest.mark.parametrize(
    ("term", "settings", "moves_z", "moves_proxies"),
    [
        ("assign", {}, True, True),
        ("anchor", {}, False, True),
        ("anchor", {"detach_reference_in_anchor": False}, True, True),
        ("hard", {}, True, True),
        ("center", {}, True, False),
        ("center", {"detach_reference_in_center": False}, True, False),
    ],
)
def test_gradients_flow_where_they_should_and_nowhere_else(term, settings, moves_z, moves_proxies):
    loss, (z, y) = shta_loss(5, 8, **settings), some_tokens(5)
    assert gradients_of(loss, term, z, y) == (moves_z, moves_proxies)


@pytest.mark.parametrize("detach", [True, False])
def test_the_center_loss_moves_hard_tokens_and_through_its_reference_all_of_their_classes(detach):
    loss, (z, y) = shta_loss(5, 8, detach_reference_in_center=detach), some_tokens(5)
    z.requires_grad_()
    terms = loss(z, y)
    terms.center.backward()
    moved = z.grad.abs().sum(1) > 0
    if detach:
        assert moved.sum() == terms.num_hard
    else:
        assert moved.sum() > terms.num_hard
        assert not moved[y[:, 1:].sum(1) == 0].any()  # background has no center, and what is not in Omega_l no part


def test_normalized_embeddings_count_alike_whatever_their_length():
    z, y = some_tokens(5)
    longer = z * torch.linspace(0.5, 5, len(z))[:, None]
    raw, unit = shta_loss(5, 8), shta_loss(5, 8, normalize_embeddings=True)
    unit.load_state_dict(raw.state_dict())
    for name in LOSSES:
        torch.testing.assert_close(getattr(unit(longer, y), name), getattr(unit(z, y), name))
        torch.testing.assert_close(
            getattr(unit(z, y), name), getattr(raw(torch.nn.functional.normalize(z, dim=1), y), name)
        )
    for name in ("anchor", "center"):  # Eq. 4 and 9, with raw z
        assert abs(getattr(raw(longer, y), name) - getattr(raw(z, y), name)) > 1e-3


@pytest.mark.parametrize("empty", ["no token", "no labeled token", "background only", "nothing confident"])
def test_empty_sets_give_zero_and_zero_gradients(empty):
    z, y = some_tokens(3)
    settings = {}
    if empty == "no token":
        z, y = z[:0], y[:0]
    elif empty == "no labeled token":
        y = torch.zeros_like(y)
    elif empty == "background only":
        y = torch.eye(3)[torch.zeros(len(y), dtype=torch.long)]
    else:
        settings = {"conf_threshold": 1.0, "temperature": 1.0}
    loss = shta_loss(3, 8, **settings)
    z = z.clone().requires_grad_()
    terms = loss(z, y)
    assert terms.hard == 0
    assert terms.center == 0
    assert terms.num_hard == 0
    if empty in ("no token", "no labeled token"):
        assert terms.total == 0
    assert all(value.isfinite().all() for value in terms)
    terms.total.backward()
    assert loss.proxies.grad is not None  # every parameter has a gradient at every step, or DDP waits forever
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_autocast_does_not_reach_the_losses():
    loss, (z, y) = shta_loss(5, 8), some_tokens(5)
    plain = loss(z.bfloat16(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(z.bfloat16(), y)
    assert all(value.dtype == torch.float32 for value in under_autocast)
    for a, b in zip(plain, under_autocast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"hard_ratio": 0}, {"hard_ratio": 1.5}, {"selection": "all"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        shta_loss(3, 8, **settings)


def _reference_on_rank(rank, folder, z, y):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    loss = shta_loss(4, 8)
    half = slice(rank, None, 2)
    reference, mass = loss._class_references(z[half], y[half])
    torch.save((reference, mass), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_synchronised_references_are_those_of_all_ranks_tokens(tmp_path):
    z, y = some_tokens(4)
    mp.start_processes(_reference_on_rank, (str(tmp_path), z, y), nprocs=2, start_method="fork")
    expected = shta_loss(4, 8, sync_references=False)._class_references(z, y)
    for rank in range(2):
        for a, b in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(a, b)


def _gradient_on_rank(rank, folder, z, y):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss = shta_loss(4, 8, detach_reference_in_center=False)
    loss.load_state_dict(torch.load(os.path.join(folder, "loss.pt")))
    z = z.clone().requires_grad_()
    loss(z, y).center.backward()
    torch.save(z.grad, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_a_reference_with_a_gradient_stays_on_its_rank(tmp_path):
    z, y = some_tokens(4)
    loss = shta_loss(4, 8, detach_reference_in_center=False)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    mp.start_processes(_gradient_on_rank, (str(tmp_path), z, y), nprocs=2, start_method="fork")
    z = z.clone().requires_grad_()
    loss(z, y).center.backward()
    torch.testing.assert_close(torch.load(tmp_path / "rank1.pt"), z.grad)
