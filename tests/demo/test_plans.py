"""Shrunk plans."""

from __future__ import annotations

import pytest

from nnunet_ssl.demo.plans import shrink_plans
from nnunet_ssl.errors import UserError


def test_first_stages_stay_and_the_rest_of_the_plans_is_untouched(tiny_copy):
    dataset = tiny_copy("anisotropic")
    before = dataset.plans
    shrink_plans(dataset.plans_file, "3d_fullres", (3, 5), patch_size=(4, 8, 8), batch_size=3, convs_per_stage=1)
    after = dataset.plans
    network, planned = (p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] for p in (after, before))
    assert network["features_per_stage"] == [3, 5]
    assert network["strides"] == planned["strides"][:2]
    assert network["n_conv_per_stage_decoder"] == [1]
    assert after["configurations"]["3d_fullres"]["batch_size"] == 3
    for plans in (before, after):
        for key in ("architecture", "patch_size", "batch_size"):
            del plans["configurations"]["3d_fullres"][key]
    assert before == after


@pytest.mark.parametrize(
    ("configuration", "features", "message"),
    [("3d_lowres", (4, 4), "no configuration '3d_lowres'"), ("3d_fullres", (4,) * 9, "fewer than the 9")],
)
def test_what_the_plans_do_not_have_is_refused(tiny_copy, configuration, features, message):
    dataset = tiny_copy("3d")
    before = dataset.plans_file.read_text()
    with pytest.raises(UserError, match=message):
        shrink_plans(dataset.plans_file, configuration, features)
    assert dataset.plans_file.read_text() == before
