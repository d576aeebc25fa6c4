"""What a step waits for, holds, moves and computes on a GPU does not grow; no GPU is needed to see it.

At nnU-Net's usual size, 128^3 voxels and 14 classes, and relative to ``nnUNetTrainer``: see ``helpers/fake_cuda.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
from helpers.datasets import TinyDataset
from helpers.fake_cuda import BASELINE, Cost, NoFakeGPU, compile_stand_in, measure

from nnunet_ssl.trainers import TRAINERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SLACK = 1.03  # torch's releases differ by less
FEATURES = [32, 64, 128, 256, 320, 320]


class Ratios(NamedTuple):
    """Of a step to one of nnUNetTrainer: see ``Cost``. Of waits, their number."""

    waits: int
    peak: float
    moved: float
    flops: float


MEASURED = {
    "nnUNetTrainerLabeledOnly": Ratios(waits=0, peak=0.97, moved=0.97, flops=1.00),
    "nnUNetTrainerWarps": Ratios(waits=0, peak=0.97, moved=0.97, flops=1.00),
    "nnUNetTrainerCPS": Ratios(waits=0, peak=1.95, moved=4.12, flops=4.00),
    "nnUNetTrainerGACPS": Ratios(waits=0, peak=1.86, moved=4.13, flops=4.00),
    "nnUNetTrainerURPC": Ratios(waits=0, peak=1.39, moved=1.79, flops=2.00),
    "nnUNetTrainerMagicNet": Ratios(waits=0, peak=1.79, moved=4.52, flops=4.86),
    "nnUNetTrainerSASNet": Ratios(waits=0, peak=2.13, moved=4.12, flops=3.41),
    "nnUNetTrainerMeanTeacher": Ratios(waits=0, peak=1.02, moved=2.09, flops=2.33),
    "nnUNetTrainerUAMT": Ratios(waits=0, peak=1.08, moved=4.37, flops=5.00),
    "nnUNetTrainerICT": Ratios(waits=0, peak=1.00, moved=1.67, flops=1.83),
    "nnUNetTrainerEntMin": Ratios(waits=0, peak=1.18, moved=2.01, flops=2.00),
    "nnUNetTrainerUniMatch": Ratios(waits=0, peak=1.00, moved=4.14, flops=4.33),
    "nnUNetTrainerBCP": Ratios(waits=0, peak=1.25, moved=5.00, flops=2.33),
    "nnUNetTrainerMiDSS": Ratios(waits=0, peak=1.08, moved=4.85, flops=5.00),
    "nnUNetTrainerABD": Ratios(waits=0, peak=1.81, moved=11.82, flops=12.00),
    "nnUNetTrainerDTC": Ratios(waits=0, peak=1.27, moved=2.25, flops=2.00),
    "nnUNetTrainerSASSNet": Ratios(waits=0, peak=1.26, moved=2.31, flops=2.19),
    "nnUNetTrainerMCNetPlus": Ratios(waits=0, peak=3.23, moved=4.81, flops=6.56),
    "nnUNetTrainerSSNet": Ratios(waits=0, peak=1.11, moved=5.11, flops=5.33),
    "nnUNetTrainerCauSSL": Ratios(waits=0, peak=1.95, moved=4.31, flops=4.01),
    "nnUNetTrainerDHC": Ratios(waits=0, peak=1.81, moved=3.91, flops=4.00),
    "nnUNetTrainerSKCDF": Ratios(waits=0, peak=1.31, moved=2.78, flops=2.34),
    "nnUNetTrainerAUSS": Ratios(waits=0, peak=1.38, moved=2.89, flops=2.75),
    "nnUNetTrainerSHTA_LabeledOnly": Ratios(waits=0, peak=1.02, moved=1.07, flops=1.00),
    "nnUNetTrainerSHTA_CPS": Ratios(waits=0, peak=1.99, moved=4.21, flops=4.00),
    "nnUNetTrainerSHTA_GACPS": Ratios(waits=0, peak=1.91, moved=4.23, flops=4.00),
    "nnUNetTrainerSHTA_URPC": Ratios(waits=0, peak=1.39, moved=1.88, flops=2.00),
    "nnUNetTrainerSHTA_MagicNet": Ratios(waits=0, peak=1.79, moved=4.61, flops=4.86),
    "nnUNetTrainerSHTA_MeanTeacher": Ratios(waits=0, peak=1.05, moved=2.18, flops=2.34),
    "nnUNetTrainerSHTA_UAMT": Ratios(waits=0, peak=1.08, moved=4.46, flops=5.00),
    "nnUNetTrainerSHTA_ICT": Ratios(waits=0, peak=1.05, moved=1.77, flops=1.84),
    "nnUNetTrainerSHTA_EntMin": Ratios(waits=0, peak=1.22, moved=2.11, flops=2.00),
    "nnUNetTrainerSHTA_UniMatch": Ratios(waits=0, peak=1.02, moved=4.26, flops=4.34),
    "nnUNetTrainerSHTA_MiDSS": Ratios(waits=0, peak=1.08, moved=4.92, flops=5.00),
    "nnUNetTrainerSHTA_ABD": Ratios(waits=0, peak=1.81, moved=11.88, flops=12.00),
    "nnUNetTrainerSHTA_DTC": Ratios(waits=0, peak=1.32, moved=2.35, flops=2.01),
    "nnUNetTrainerSHTA_SASSNet": Ratios(waits=0, peak=1.30, moved=2.40, flops=2.19),
    "nnUNetTrainerSHTA_MCNetPlus": Ratios(waits=0, peak=3.27, moved=4.90, flops=6.57),
    "nnUNetTrainerSHTA_SSNet": Ratios(waits=0, peak=1.15, moved=5.20, flops=5.34),
    "nnUNetTrainerSHTA_CauSSL": Ratios(waits=0, peak=1.99, moved=4.40, flops=4.01),
    "nnUNetTrainerSHTA_DHC": Ratios(waits=0, peak=1.86, moved=4.00, flops=4.00),
    "nnUNetTrainerSHTA_AUSS": Ratios(waits=0, peak=1.42, moved=2.98, flops=2.75),
    "nnUNetTrainerMAE": Ratios(waits=0, peak=0.97, moved=0.82, flops=1.00),
}


@pytest.fixture(scope="module")
def measured(
    tiny: Callable[..., TinyDataset], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Cost]]:
    """``measured(trainers, **more)``: see ``helpers.fake_cuda.measure``."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    dataset = tiny("3d")
    plans, dataset_json = dataset.plans, dataset.dataset_json
    configuration = plans["configurations"][dataset.configuration]
    configuration["patch_size"] = [128] * 3
    stages = len(FEATURES)
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": FEATURES,
        "kernel_sizes": [[3] * 3] * stages,
        "strides": [[1] * 3] + [[2] * 3] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    plans["configurations"] = {dataset.configuration: configuration}
    dataset_json["labels"] = {"background": 0, **{f"organ{i}": i for i in range(1, 14)}}
    stand_in = compile_stand_in(tmp_path_factory.mktemp("fake_cuda"))

    def of(trainers: list[str], **more: str) -> dict[str, Cost]:
        try:
            return measure(trainers, plans, dataset_json, stand_in, **more)
        except NoFakeGPU:
            pytest.skip("this torch takes no stand-in for the CUDA runtime")

    return of


@pytest.fixture(scope="module")
def costs(request: pytest.FixtureRequest, measured: Callable[..., dict[str, Cost]]) -> dict[str, Cost]:
    """Of every trainer whose test was selected, measured once."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return measured([BASELINE, *(item.callspec.params["trainer"] for item in here)])


def test_nnunets_own_step_is_what_it_is_known_to_be(costs: dict[str, Cost]) -> None:
    """Two waits: the scaler's, and the loss. The U-Net's operations, by hand: see ``forward_flops``."""
    cost = costs[BASELINE]
    assert cost.waits == 2, cost.places
    assert cost.flops == pytest.approx(3 * forward_flops(), rel=0.01)  # backward takes two of each


def forward_flops(batch: int = 2, side: int = 128, classes: int = 14) -> float:
    """Two for each weight and voxel of each convolution, of encoder, decoder, transposed convolutions and heads."""
    total, channels = 0.0, 1
    for stage, features in enumerate(FEATURES):
        voxels = (side / 2**stage) ** 3
        total += voxels * 27 * (channels * features + features * features)
        channels = features
    for stage, features in enumerate(FEATURES[:-1]):
        voxels = (side / 2**stage) ** 3
        total += voxels * (FEATURES[stage + 1] * features + 27 * (2 + 1) * features**2 + features * classes)
    return 2 * batch * total


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_costs_no_more_than_it_did(trainer: str, costs: dict[str, Cost]) -> None:
    cost, base, known = costs[trainer], costs[BASELINE], MEASURED[trainer]
    now = Ratios(cost.waits, cost.peak / base.peak, cost.moved / base.moved, cost.flops / base.flops)
    print(trainer, now)  # for MEASURED: pytest -rP
    assert now.waits <= known.waits, cost.places
    grown = [name for name in ("peak", "moved", "flops") if getattr(now, name) > SLACK * getattr(known, name)]
    assert not grown, f"{now}, was {known}"


def test_augmentation_on_the_device_waits_for_nothing(measured: Callable[..., dict[str, Cost]]) -> None:
    """Every image of both streams is resampled, changed by all intensity transforms, mirrored and masked."""
    cost = measured(["nnUNetTrainerURPC"], augment="device")["nnUNetTrainerURPC"]
    assert cost.waits <= MEASURED["nnUNetTrainerURPC"].waits, cost.places


def test_sasnets_memory_in_ram_takes_two_copies_to_the_host(measured: Callable[..., dict[str, Cost]]) -> None:
    """Of the whole batch: where its voxels come from, and how confident the branches are."""
    cost = measured(["nnUNetTrainerSASNet"], memory="cpu")["nnUNetTrainerSASNet"]
    assert sum(cost.places.values()) == 2, cost.places
    assert all(place.startswith("to the host, sasnet/memory.py") for place in cost.places)
