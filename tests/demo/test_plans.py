"""Shrunk plans."""

from __future__ import annotations

import json

import pytest
from helpers.damage import JSON_DAMAGE, with_byte_order_mark

from nnunet_ssl.demo.plans import main, shrink_plans
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


def test_the_command_writes_what_the_function_does(tiny_copy):
    dataset = tiny_copy("anisotropic")
    planned = dataset.plans_file.read_text()
    shrink_plans(dataset.plans_file, "3d_fullres", (3, 5), patch_size=(4, 8, 8), batch_size=3)
    expected = dataset.plans
    dataset.plans_file.write_text(planned)
    options = ["--features", "3", "5", "--patch-size", "4", "8", "8", "--batch-size", "3"]
    main([str(dataset.plans_file), "3d_fullres", *options])
    assert dataset.plans == expected
    with pytest.raises(UserError, match="no configuration '3d_lowres'"):
        main([str(dataset.plans_file), "3d_lowres", *options])


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


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_damaged_plans_are_named(tmp_path, damage):
    file = tmp_path / "nnUNetPlans.json"
    stages = {"n_stages": 3, "kernel_sizes": [3] * 3, "strides": [1] * 3}
    plans = {"configurations": {"3d_fullres": {"architecture": {"arch_kwargs": stages}}}}
    file.write_text(json.dumps(plans))
    with_byte_order_mark(file)
    shrink_plans(file, "3d_fullres", (4, 4))
    JSON_DAMAGE[damage](file)
    with pytest.raises(UserError, match=str(file)):
        shrink_plans(file, "3d_fullres", (4, 4))
    if file.is_file():
        for wrong in (3, {"architecture": 3}, {"architecture": {"arch_kwargs": {"n_stages": 3}}}, None):
            file.write_text(json.dumps({"configurations": {"3d_fullres": wrong}}))
            with pytest.raises(UserError, match=f"{file}: 3d_fullres is not as nnU-Net plans it"):
                shrink_plans(file, "3d_fullres", (4, 4))
