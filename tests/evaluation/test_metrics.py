"""Metrics of a case against an oracle that compares every surface voxel with every other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from nnunet_ssl.evaluation.metrics import EMPTY_RULES, METRICS, Options, case_metrics, surface_metrics

ALL = Options()


def surface_points(mask, spacing):
    """Coordinates of the voxels with a face neighbor outside the mask, found neighbor by neighbor."""
    points = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbor = list(voxel)
            neighbor[axis] += step
            beyond = not 0 <= neighbor[axis] < mask.shape[axis]
            if beyond or not mask[tuple(neighbor)]:
                points.append(np.array(voxel) * spacing)
                break
    return np.array(points)


def oracle(prediction, reference, spacing, tolerance):
    """Every metric from all pairs of surface voxels and plain counting."""
    p, t = surface_points(prediction, spacing), surface_points(reference, spacing)
    pairs = np.sqrt(((p[:, None] - t[None]) ** 2).sum(-1))
    from_p, from_t = pairs.min(1), pairs.min(0)
    both = sorted([*from_p, *from_t])
    place = 0.95 * (len(both) - 1)  # linear interpolation between the neighbors in order
    low, high = both[math.floor(place)], both[math.ceil(place)]
    overlap = (prediction & reference).sum()
    return {
        "Dice": 2 * overlap / (prediction.sum() + reference.sum()),
        "IoU": overlap / (prediction | reference).sum(),
        "HD95": low + (place - math.floor(place)) * (high - low),
        "ASD": from_p.mean(),
        "ASSD": (from_p.mean() + from_t.mean()) / 2,
        "NSD": ((from_p <= tolerance).sum() + (from_t <= tolerance).sum()) / len(both),
    }


def blob(shape, seed):
    """A mask with islands and holes that also touches the border."""
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.2) > 0.05


def measured(prediction, reference, spacing, options=ALL, **more):
    """Case metrics of two masks, as label 1."""
    return case_metrics(reference.astype(np.int32), prediction.astype(np.int32), [1], spacing, options, **more)[1]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((15, 17), (1, 1)), ((15, 17), (0.7, 2.3)), ((9, 10, 11), (1, 1, 1)), ((7, 12, 10), (2.5, 0.8, 1.1))],
)
def test_every_metric_equals_brute_force(shape, spacing, seed):
    prediction, reference = blob(shape, seed), blob(shape, seed + 10)
    result = measured(prediction, reference, spacing, Options(tolerance=1.3))
    for key, value in oracle(prediction, reference, spacing, 1.3).items():
        assert result[key] == pytest.approx(value, rel=1e-5), key


def test_distances_in_voxels_ignore_the_spacing():
    prediction, reference = blob((8, 9, 10), 0), blob((8, 9, 10), 1)
    in_voxels = measured(prediction, reference, (3, 1, 0.5), Options(in_mm=False))
    assert in_voxels == measured(prediction, reference, (1, 1, 1))
    assert in_voxels["HD95"] != measured(prediction, reference, (3, 1, 0.5))["HD95"]


def test_sphere_shifted_by_two_voxels():
    """The voxel-border numbers; DeepMind's area-weighted definition gives 2.449 and 0.852 on the same masks."""
    z, y, x = np.indices((64, 64, 64)) - 31.5
    sphere = z**2 + y**2 + x**2 <= 20**2
    result = measured(np.roll(sphere, 2, axis=0), sphere, (2, 1, 1), Options(("hd95", "asd")))
    assert result["HD95"] == pytest.approx(3.000, abs=5e-4)
    assert result["ASD"] == pytest.approx(1.314, abs=5e-4)


def test_single_voxels_are_as_far_apart_as_they_are():
    prediction, reference = np.zeros((2, 6, 7, 8), bool)
    prediction[1, 2, 3], reference[2, 4, 6] = True, True
    result = measured(prediction, reference, (3, 1, 2))
    assert result["HD95"] == result["ASD"] == result["ASSD"] == pytest.approx(7)  # 3, 2, 6
    assert result["NSD"] == result["Dice"] == result["IoU"] == 0


def test_asd_goes_from_the_prediction_to_the_truth():
    reference, prediction = np.zeros((2, 30), bool)
    reference[[5, 20]], prediction[5] = True, True
    assert measured(prediction, reference, (1,))["ASD"] == 0
    assert measured(reference, prediction, (1,))["ASD"] == 7.5
    assert measured(prediction, reference, (1,))["ASSD"] == measured(reference, prediction, (1,))["ASSD"] == 3.75


def test_equal_masks():
    mask = blob((8, 9, 10), 3)
    result = measured(mask, mask, (1, 2, 3))
    assert [result[k] for k in ("Dice", "IoU", "HD95", "ASD", "ASSD", "NSD")] == [1, 1, 0, 0, 0, 1]


def test_tolerance_includes_a_distance_that_equals_it():
    reference, prediction = np.zeros((2, 40), bool)
    reference[5], prediction[8] = True, True
    assert measured(prediction, reference, (0.1,), Options(tolerance=0.3))["NSD"] == 1  # 3 * 0.1 > 0.3 in floats
    assert measured(prediction, reference, (0.1,), Options(tolerance=0.29))["NSD"] == 0


def test_what_surrounds_the_masks_changes_nothing():
    """Only the bounding box is worked on."""
    prediction, reference = blob((8, 9, 10), 0), blob((8, 9, 10), 1)
    small = measured(np.pad(prediction, 1), np.pad(reference, 1), (1, 2, 3))
    large = measured(np.pad(prediction, (9, 30)), np.pad(reference, (9, 30)), (1, 2, 3))
    assert {**small, "TN": None} == {**large, "TN": None}


def test_image_with_one_slice_is_2d():
    """As nnU-Net reads 2D images, with 999 mm between the slices that there are not."""
    prediction, reference = blob((15, 17), 0), blob((15, 17), 1)
    flat = measured(prediction, reference, (2, 3))
    assert measured(prediction[None], reference[None], (999, 2, 3)) == flat
    assert measured(prediction[:, None], reference[:, None], (2, 999, 3)) == flat


def test_thin_structure_in_a_volume_is_all_surface():
    """A bounding box one voxel thick is not an image one voxel thick."""
    prediction, reference = np.zeros((2, 6, 9, 9), bool)
    prediction[2, 1:8, 1:8] = reference[2, 1:8, 1:8] = True
    reference[2, 4, 4] = False
    result = measured(prediction, reference, (1, 1, 1))
    expected = oracle(prediction, reference, (1, 1, 1), 1)
    assert result["ASD"] == pytest.approx(expected["ASD"])
    assert result["ASD"] > 0  # the prediction's voxel in the hole of the truth


@pytest.mark.parametrize("rule", EMPTY_RULES)
@pytest.mark.parametrize("empty", ["both", "prediction", "truth"])
def test_empty_rules(rule, empty):
    nan = math.nan
    share, distance = {
        ("nan", "both"): (nan, nan), ("medpy", "both"): (0, 0), ("128", "both"): (1, 0),
        ("nan", "one"): (0, nan), ("medpy", "one"): (0, 0), ("128", "one"): (0, 128),
    }[rule, "both" if empty == "both" else "one"]  # fmt: skip
    mask, nothing = blob((5, 6, 7), 0), np.zeros((5, 6, 7), bool)
    prediction, reference = nothing if empty != "truth" else mask, nothing if empty != "prediction" else mask
    result = measured(prediction, reference, (1, 1, 1), Options(empty=rule))
    np.testing.assert_equal([result[k] for k in ("Dice", "IoU", "NSD")], [share] * 3)
    np.testing.assert_equal([result[k] for k in ("HD95", "ASD", "ASSD")], [distance] * 3)
    assert (result["n_pred"], result["n_ref"]) == (prediction.sum(), reference.sum())


def test_classes_and_regions_equal_their_masks():
    rng = np.random.default_rng(0)
    reference, prediction = rng.integers(0, 5, (2, 6, 7, 8)).astype(np.int32)
    result = case_metrics(reference, prediction, [1, 3, (1, 3), (2, 3, 4)], (1, 2, 1), ALL)
    for cls, members in {1: [1], 3: [3], (1, 3): [1, 3], (2, 3, 4): [2, 3, 4]}.items():
        assert result[cls] == measured(np.isin(prediction, members), np.isin(reference, members), (1, 2, 1))
    assert list(result) == [1, 3, (1, 3), (2, 3, 4)]


def test_labels_that_are_no_class_count_as_background():
    reference, prediction = np.array([[0, 1, 1, 7]]), np.array([[-1, 1, 300, 1]])
    result = case_metrics(reference, prediction, [1], (1, 1), Options(("dice",)))[1]
    assert (result["TP"], result["FP"], result["FN"], result["TN"]) == (1, 1, 1, 1)


def test_ignored_voxels_do_not_count():
    prediction, reference = blob((6, 7, 8), 0).astype(np.int32), blob((6, 7, 8), 1).astype(np.int32)
    ignored = np.zeros(reference.shape, bool)
    ignored[:3] = True
    cut = measured((prediction * ~ignored) > 0, (reference * ~ignored) > 0, (1, 1, 1))
    reference[ignored] = 2
    result = case_metrics(reference, prediction, [1], (1, 1, 1), ALL, ignore_label=2)[1]
    assert result["TN"] == cut["TN"] - ignored.sum()
    assert {**result, "TN": None} == {**cut, "TN": None}


@pytest.mark.parametrize("name", METRICS)
def test_only_what_is_asked_for_is_measured(name):
    result = measured(blob((5, 6, 7), 0), blob((5, 6, 7), 1), (1, 1, 1), Options((name,)))
    everything = measured(blob((5, 6, 7), 0), blob((5, 6, 7), 1), (1, 1, 1))
    assert {"Dice", "IoU", METRICS[name].key} == set(result) & {m.key for m in METRICS.values()}
    assert result.items() <= everything.items()


def test_masks_need_not_be_contiguous():
    prediction, reference = blob((8, 9, 10), 0), blob((8, 9, 10), 1)
    turned = surface_metrics(prediction.T, reference.T, (3, 2, 1), ALL)
    assert turned == pytest.approx(surface_metrics(prediction, reference, (1, 2, 3), ALL), rel=1e-6)
