"""``warps.png``: best, median and worst by rule, for every kind of data."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.figures import warps as module
from nnunet_ssl.figures.warps import draw_warps
from nnunet_ssl.shapes.warped import prepare_warps
from nnunet_ssl.shapes.wish import WarpManifest, Wish
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled

pytestmark = pytest.mark.usefixtures("quick_registration")


def warped(dataset, labeled: tuple[str, ...], each: int) -> Wish:
    names = dataset.name, PlansManager(dataset.plans), dataset.configuration, dataset.dataset_json
    prepared = prepare_unlabeled(*names, dataset.cases("imagesTr"), 1)
    wish = Wish(dataset.name, dataset.plans, *names[2:], labeled, (), prepared, each)
    prepare_warps(wish, 1)
    return wish


@pytest.mark.parametrize(
    "kind",
    [
        "3d",
        "png",
        pytest.param("2d", marks=pytest.mark.slow),
        pytest.param("multichannel", marks=pytest.mark.slow),
        pytest.param("anisotropic", marks=pytest.mark.slow),
        pytest.param("ignore", marks=pytest.mark.slow),
        pytest.param("regions", marks=pytest.mark.slow),
    ],
)
def test_it_is_drawn_of_every_kind_of_data(tiny_copy, kind):
    wish = warped(tiny_copy(kind), ("tr_00",), 4)
    file = draw_warps(wish)
    assert file == Path(wish.folder, "warps.png")
    assert matplotlib.image.imread(file).std() > 0.1
    assert Path(wish.folder, "warps.pdf").exists()


def test_what_is_ignored_has_no_outline(tiny_copy, monkeypatch):
    wish = warped(tiny_copy("ignore"), ("tr_00",), 1)
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda axes, image, where, labels, spacing: drawn.append((where, labels)))
    draw_warps(wish)
    classes = set(PlansManager(wish.plans).get_label_manager(wish.dataset_json).foreground_labels)
    assert drawn
    for where, labels in drawn:
        assert set(np.unique(where)) <= {0, *classes}
        assert labels is None or set(np.unique(labels)) <= {0, *classes}


def test_best_median_and_worst_are_those_of_the_rule(tiny_copy, monkeypatch):
    wish = warped(tiny_copy(), ("tr_00", "tr_01"), 2)
    manifest = WarpManifest.read(wish.folder)
    for value, entry in zip((0.61, 0.93, 0.72, 0.85), manifest.cases.values(), strict=True):
        entry["after"] = value
    manifest.write()
    by_value = {entry["after"]: (entry["moving"], entry["fixed"]) for entry in manifest.cases.values()}
    told = []
    monkeypatch.setattr(module, "save_figure", lambda figure, folder, name, caption: told.append(caption))
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda axes, image, where, labels, spacing: drawn.append((where, labels)))
    draw_warps(wish)
    order = [f"{moving} onto {fixed}" for moving, fixed in (by_value[value] for value in (0.93, 0.72, 0.61))]
    positions = [
        told[0].index(f"{which}: {pair}") for which, pair in zip(("best", "median", "worst"), order, strict=True)
    ]
    assert positions == sorted(positions)
    assert "From the 4 kept" in told[0]
    assert len(drawn) == 9
    assert [labels is None for _, labels in drawn] == [False, True, False] * 3  # an unlabeled image has no outline
    assert all(np.array_equal(drawn[row + 1][0], drawn[row + 2][0]) for row in (0, 3, 6))  # in the warp's slice


def test_one_warp_is_best_median_and_worst(tiny_copy):
    assert draw_warps(warped(tiny_copy(), ("tr_00",), 1)).exists()
