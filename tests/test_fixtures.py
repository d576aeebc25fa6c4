"""The fixtures themselves: each kind of tiny dataset is what it says, and a copy is apart from its original."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers import datasets
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("kind", datasets.RECIPES)
def test_every_kind_is_planned_and_prepared(tiny, kind):
    dataset = tiny(kind)
    recipe = dataset.recipe
    configuration = PlansManager(str(dataset.plans_file)).get_configuration(dataset.configuration)
    assert tuple(configuration.patch_size) == recipe.patch_size
    assert len(configuration.pool_op_kernel_sizes) == len(recipe.features)
    prepared = list((dataset.preprocessed / configuration.data_identifier).glob("*.pkl"))
    assert len(prepared) == recipe.labeled
    assert len(dataset.cases("imagesUn")) == recipe.unlabeled


def test_anisotropic_plans_stay_anisotropic(tiny):
    network = tiny("anisotropic").plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert network["strides"][1] == [1, 2, 2]


def test_a_copy_is_apart(tiny, tiny_copy):
    copy = tiny_copy("3d")
    copy.plans_file.unlink()
    assert tiny("3d").plans_file.exists()


def _backward():
    torch.ones((), requires_grad=True).backward()


def test_a_fork_runs_backward_whatever_test_was_first():
    """torch.compile traces under this mode, after which a first backward pass starts a GPU's thread."""
    with FakeTensorMode():
        torch.ones(1)
    _backward()
    fork = multiprocessing.get_context("fork").Process(target=_backward)
    fork.start()
    fork.join()
    assert fork.exitcode == 0
