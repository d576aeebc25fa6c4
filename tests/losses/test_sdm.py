"""Signed distance maps against brute force: by edt, by torch operations on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import functools

import edt
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_ssl.losses import sdm as sdm_module
from nnunet_ssl.losses.sdm import signed_distance_maps

SHAPES = [(7, 5), (1, 6), (6, 1), (1, 1), (5, 4, 6), (4, 1, 5), (1, 5, 1), (1, 1, 6), (6, 1, 1), (11, 2, 3)]
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3), (0.5, 2.0, 4.0)]


def by_torch(masks, present, step):
    """The way of other devices for CPU tensors: a mask and its complement, where they are two classes."""
    assert masks.shape[1] == 1
    return sdm_module._distance(torch.cat((~masks, masks), 1), step)


def signed_distance_map(mask: torch.Tensor, spacing=None) -> torch.Tensor:
    """Of one class, the mask."""
    return signed_distance_maps(mask, 2, spacing)[0][:, 0]


def has_boundary(mask: torch.Tensor) -> torch.Tensor:
    return signed_distance_maps(mask, 2)[1][:, 0]


@pytest.fixture(params=["edt", "torch", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request, monkeypatch):
    """Where masks are put; with ``torch``, CPU tensors take the way of the other devices."""
    if request.param == "torch":
        monkeypatch.setattr(sdm_module, "_distance_on_cpu", by_torch)
    return "cuda" if request.param == "cuda" else "cpu"


def brute_force(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The definition, voxel by voxel, for one mask."""
    voxels = list(np.ndindex(mask.shape))
    inside = [v for v in voxels if mask[v]]
    outside = [v for v in voxels if not mask[v]]
    result = np.zeros(mask.shape)
    if not inside or not outside:
        return result

    def nearest(v, others):
        return min(sum(((a - b) * s) ** 2 for a, b, s in zip(v, o, spacing, strict=True)) ** 0.5 for o in others)

    distance = {v: nearest(v, outside if mask[v] else inside) for v in voxels}
    max_in, max_out = max(distance[v] for v in inside), max(distance[v] for v in outside)
    for v in outside:
        result[v] = distance[v] / max_out
    for v in inside:
        face_neighbors = [o for o in outside if sum(abs(a - b) for a, b in zip(v, o, strict=True)) == 1]
        result[v] = 0 if face_neighbors else -distance[v] / max_in
    return result


def random_masks(shape, count=12, seed=0) -> torch.Tensor:
    """From almost empty to almost full, and some that are one or the other."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, count).view(-1, *[1] * len(shape))
    return torch.rand(count, *shape, generator=generator) < share


def ellipsoid(shape, center, radii) -> torch.Tensor:
    grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grids, center, radii, strict=True)) <= 1


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(device, shape, spacing):
    spacing = spacing[: len(shape)]
    masks = random_masks(shape)
    result = signed_distance_map(masks.to(device), spacing).cpu().numpy()
    for mask, one in zip(masks.numpy(), result, strict=True):
        np.testing.assert_allclose(one, brute_force(mask, spacing), atol=1e-6)


def test_the_axes_keep_their_spacing(device):
    """One voxel: along each axis the distance grows with its spacing, which fails if axes are taken in reverse."""
    spacing = (5.0, 2.0, 1.0)
    mask = torch.zeros(1, 5, 5, 5, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    result = signed_distance_map(mask.to(device), spacing).cpu()[0]
    farthest = (20**2 + 8**2 + 4**2) ** 0.5
    steps = torch.arange(5.0)
    for line, s in zip((result[:, 0, 0], result[0, :, 0], result[0, 0, :]), spacing, strict=True):
        torch.testing.assert_close(line * farthest, steps * s)


def test_edt_measures_both_labels_in_one_pass_and_names_axes_in_the_order_of_the_array():
    """What the CPU path builds on, of the library itself."""
    masks = random_masks((6, 5, 4))[4:8].numpy()
    for mask in masks:
        both = edt.edt(mask.astype(np.uint8) + 1, anisotropy=(3.0, 2.0, 0.5), black_border=False)
        inside, outside = (distance_transform_edt(m, sampling=(3.0, 2.0, 0.5)) for m in (mask, ~mask))
        np.testing.assert_allclose(both, inside + outside, rtol=1e-6)


def test_units_of_the_spacing_do_not_matter(device):
    masks = random_masks((6, 5, 4)).to(device)
    expected = signed_distance_map(masks, (3.0, 1.0, 0.5))
    for unit in (1e-12, 1e12):
        torch.testing.assert_close(signed_distance_map(masks, (3 * unit, unit, 0.5 * unit)), expected)


def test_no_spacing_is_voxel_units(device):
    masks = random_masks((6, 5, 4)).to(device)
    assert torch.equal(signed_distance_map(masks), signed_distance_map(masks, (2, 2, 2)))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (1, 1), (1, 1, 1)])
def test_empty_and_full_masks_have_no_boundary_and_give_zeros(device, shape):
    masks = torch.stack((torch.zeros(shape), torch.ones(shape))).bool().to(device)
    assert has_boundary(masks).tolist() == [False, False]
    assert torch.equal(signed_distance_map(masks, [2.0, *[1.0] * (len(shape) - 1)]), torch.zeros_like(masks).float())


def test_one_voxel_is_its_own_boundary(device):
    mask = torch.zeros(1, 5, 5, 5, dtype=torch.bool, device=device)
    mask[0, 2, 2, 2] = True
    result = signed_distance_map(mask).cpu()
    assert has_boundary(mask).tolist() == [True]
    assert result[0, 2, 2, 2] == 0
    assert (result == 0).sum() == 1
    torch.testing.assert_close(result[0, 0, 0, 0], torch.tensor(1.0))
    torch.testing.assert_close(result[0, 2, 2, 1], torch.tensor(1 / 12**0.5))


def test_the_edge_of_the_image_is_no_boundary(device):
    """A half-filled image: depth is counted from the one face inside the image."""
    mask = torch.zeros(1, 8, 3, 4, dtype=torch.bool, device=device)
    mask[0, :5] = True
    result = signed_distance_map(mask).cpu()[0]
    expected = torch.tensor([-1, -4 / 5, -3 / 5, -2 / 5, 0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(result, expected.view(8, 1, 1).expand(8, 3, 4))


def test_range_and_sign(device):
    masks = torch.stack([ellipsoid((20, 18, 12), (9, 8, 5), r) for r in ((6, 5, 3), (3, 7, 5), (30, 4, 4))]).to(device)
    result = signed_distance_map(masks, (1.0, 1.0, 2.5))
    assert result.dtype == torch.float32
    assert result.device == masks.device
    assert not result.requires_grad
    assert (result.amax((1, 2, 3)) == 1).all()
    assert (result.amin((1, 2, 3)) == -1).all()
    assert (result[~masks] > 0).all()
    assert (result[masks] <= 0).all()


def test_samples_do_not_see_each_other(device):
    masks = random_masks((5, 4, 6)).to(device)
    together = signed_distance_map(masks, (2.0, 1.0, 1.0))
    alone = torch.cat([signed_distance_map(m[None], (2.0, 1.0, 1.0)) for m in masks])
    assert torch.equal(together, alone)
    assert torch.equal(signed_distance_map(masks.flip(0), (2.0, 1.0, 1.0)), together.flip(0))


def test_masks_need_not_be_contiguous(device):
    masks = random_masks((5, 4, 6)).to(device)
    for order in ((0, 3, 1, 2), (0, 3, 2, 1), (0, 2, 1, 3)):
        turned = masks.permute(order)
        assert not turned.is_contiguous()
        spacing = [(3.0, 0.7, 1.3)[axis - 1] for axis in order[1:]]
        expected = signed_distance_map(masks, (3.0, 0.7, 1.3)).permute(order)
        torch.testing.assert_close(signed_distance_map(turned, spacing), expected)
    classes = torch.stack((masks, ~masks), 1)
    torch.testing.assert_close(signed_distance_map(classes[:, 1]), signed_distance_map(~masks))


def test_mask_and_complement_have_opposite_distances(device):
    """Apart from the inner boundaries, which lie on different sides."""
    masks = random_masks((6, 7, 5), count=8)[2:6].to(device)
    a, b = signed_distance_map(masks), signed_distance_map(~masks)
    neither = (a != 0) & (b != 0)
    torch.testing.assert_close(a[neither], -b[neither])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_paths_agree_on_larger_masks(spacing):
    """Several blocks of planes along each axis, the last one incomplete."""
    shape = (37, 26, 19)
    masks = torch.stack([ellipsoid(shape, (c, 20 - c, 9), (c, 8, 3 + c)) for c in (4, 9, 13, 17, 20)])
    masks |= torch.rand(masks.shape, generator=torch.Generator().manual_seed(0)) < 1e-3
    step = [s / max(spacing) for s in spacing]
    masks = masks[:, None]
    expected = sdm_module._distance_on_cpu(masks, torch.ones(len(masks), 1, dtype=torch.bool), step)
    classes = torch.cat((~masks, masks), 1)
    torch.testing.assert_close(sdm_module._distance(classes, step), expected, rtol=1e-5, atol=1e-6)
    if torch.cuda.is_available():
        torch.testing.assert_close(sdm_module._distance(classes.cuda(), step).cpu(), expected, rtol=1e-5, atol=1e-6)


def some_labels(shape, num_classes, count=6, seed=0) -> torch.Tensor:
    """Blobs and single voxels; of one class alone in the first, and without the last class in the second."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count, *(-(-n // 3) for n in shape)), generator=generator)
    for axis, n in enumerate(shape, 1):
        labels = labels.repeat_interleave(3, axis).narrow(axis, 0, n)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.05, num_classes - 1, labels)
    labels[0] = 1
    labels[1].clamp_(max=num_classes - 2)
    return labels


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("shape", "num_classes"), [((13, 10, 7), 2), ((13, 10, 7), 5), ((9, 1, 12), 4), ((11, 8), 3)])
def test_classes_together_are_each_class_alone_bit_for_bit(device, monkeypatch, shape, num_classes, spacing):
    """Inside, a class is as far from its complement as from the nearest other class."""
    labels, spacing = some_labels(shape, num_classes).to(device), spacing[: len(shape)]
    alone = [signed_distance_maps(labels == k, 2, spacing) for k in range(1, num_classes)]
    if sdm_module._distance_on_cpu is by_torch:
        step = [s / max(spacing) for s in spacing]
        classes = torch.stack([labels == k for k in range(num_classes)], 1)
        monkeypatch.setattr(sdm_module, "_distance_on_cpu", lambda *_: sdm_module._distance(classes, step))
    sdm, present = signed_distance_maps(labels, num_classes, spacing)
    assert torch.equal(sdm, torch.cat([maps for maps, _ in alone], 1))
    assert torch.equal(present, torch.cat([some for _, some in alone], 1))
    assert not present[0].any()
    assert present.any()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_each_class_is_scipys_distance(spacing):
    labels = some_labels((13, 10, 7), 4)
    classes = torch.stack([labels == k for k in range(4)], 1)
    distance = sdm_module._distance(classes, [s / max(spacing) for s in spacing])
    for b, k in np.ndindex(len(labels), 3):
        mask = classes[b, k + 1].numpy()
        if mask.any() and not mask.all():
            inside, outside = (distance_transform_edt(m, sampling=spacing) for m in (mask, ~mask))
            np.testing.assert_allclose(distance[b, k] * max(spacing), outside - inside, rtol=1e-6)


def test_chunks_of_maps_change_nothing(monkeypatch):
    labels = some_labels((6, 5, 4), 3)
    classes = torch.stack([labels == k for k in range(3)], 1)
    whole = sdm_module._distance(classes, (1.0, 0.5, 1.0))
    for maps in (1, 5):
        monkeypatch.setattr(sdm_module, "_CHUNK_BYTES", maps * sdm_module._BLOCK * 4 * 120)
        assert torch.equal(sdm_module._distance(classes, (1.0, 0.5, 1.0)), whole)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_bits(monkeypatch, backend):
    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    labels = some_labels((19, 13, 10), 4)
    classes = torch.stack([labels == k for k in range(4)], 1)
    expected = sdm_module._distance(classes, (1.0, 0.37, 0.61))
    assert graphs.frame_count == 0
    assert torch.equal(sdm_module._distance(classes, (1.0, 0.37, 0.61), compiled=True), expected)
    assert graphs.frame_count == 2  # one an axis


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_the_gpu():
    masks = random_masks((20, 17, 9)).cuda()
    signed_distance_map(masks, (1.0, 1.0, 2.0))  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        signed_distance_map(masks, (1.0, 1.0, 2.0))
        has_boundary(masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_value_is_read_on_the_way_of_other_devices():
    """Meta tensors have no values: reading one, or going to the CPU, raises."""
    mask = torch.zeros(3, 20, 9, 5, dtype=torch.bool, device="meta")
    assert signed_distance_map(mask, (1.0, 2.0, 3.0)).shape == mask.shape
    assert has_boundary(mask).shape == (3,)


def test_has_boundary():
    masks = torch.zeros(4, 3, 4, 5, dtype=torch.bool)
    masks[1, 0, 0, 0] = True
    masks[2] = True
    masks[3] = True
    masks[3, 2, 3, 4] = False
    assert has_boundary(masks).tolist() == [False, True, False, True]


def test_an_empty_batch_stays_empty(device):
    assert signed_distance_map(torch.zeros(0, 4, 5, 6, dtype=torch.bool, device=device)).shape == (0, 4, 5, 6)


@pytest.mark.parametrize(
    ("mask", "spacing", "named"),
    [
        (torch.zeros(1, 4, 4), None, "float32"),
        (torch.zeros(4, 4).bool(), None, "labels"),
        (torch.zeros(1, 2, 2, 2, 2).bool(), None, "labels"),
        (torch.zeros(1, 4, 4).bool(), (1.0, 1.0, 1.0), "spacing"),
        (torch.zeros(1, 4, 4).bool(), (1.0, 0.0), "spacing"),
        (torch.zeros(1, 4, 4).bool(), (1.0, float("nan")), "spacing"),
    ],
)
def test_what_does_not_fit_is_refused(mask, spacing, named):
    with pytest.raises(ValueError, match=named):
        signed_distance_maps(mask, 2, spacing)
