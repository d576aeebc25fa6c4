"""Which classes are drawn."""

from __future__ import annotations

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.options import find_classes

REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def test_classes_by_label_and_name_in_the_datasets_order() -> None:
    content = {"labels": {"background": 0, "liver": 1, "spleen": 2, "aorta": 5}}
    assert find_classes(content) == ({"liver": 1, "spleen": 2, "aorta": 5}, [1, 2, 5])
    assert find_classes(content, ["aorta", "1"])[1] == [1, 5]
    assert find_classes({"labels": {"background": 0, "liver": [1]}}) == ({"liver": 1}, [1])  # no region to nnU-Net
    with pytest.raises(UserError, match=r"--classes 3 .*1 \(liver\), 2 \(spleen\), 5 \(aorta\)"):
        find_classes(content, ["3"])


def test_regions_are_classes_too() -> None:
    labels, classes = find_classes({"labels": REGIONS, "regions_class_order": [1, 2]}, ["whole"])
    assert (labels, classes) == ({"whole": (1, 2), "core": 2}, [(1, 2)])
