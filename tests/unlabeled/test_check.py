"""Which images nnU-Net could not use with a dataset's plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.unlabeled.check import BadImageError, CheckingPlans
from nnunet_ssl.unlabeled.prepare import prepare_unlabeled

IMAGE = np.random.default_rng(0).normal(100, 10, (20, 22, 24)).astype(np.float32)


def write(file: Path, array: np.ndarray, *spacing: float) -> str:
    """``spacing``: in SimpleITK's order, x first."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing or [1.0] * array.ndim)
    sitk.WriteImage(image, str(file))
    return str(file)


@pytest.mark.parametrize(
    ("kind", "transpose", "refused"), [("3d", [0, 1, 2], True), ("2d", [0, 1, 2], False), ("2d", [2, 0, 1], True)]
)
def test_a_2d_image_is_refused_where_it_has_no_slice_of_the_datasets_kind(tiny, tmp_path, kind, transpose, refused):
    dataset = tiny(kind)
    plans = CheckingPlans({**dataset.plans, "transpose_forward": transpose}, 1, dataset.configuration)
    file = write(tmp_path / "x_0000.nii.gz", IMAGE[3])
    if refused:
        with pytest.raises(BadImageError, match=r"x_0000.nii.gz: the image is 2D, but the labeled images .* are 3D\."):
            plans.image_reader_writer_class().read_images([file])
    else:
        assert plans.image_reader_writer_class().read_images([file])[0].shape == (1, 1, 22, 24)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_what_nnunet_takes_is_prepared_as_nnunet_does(tiny_copy, kind):
    """Slice spacings of 999 mean nothing, in-plane spacings vary, and volumes have slices for a 2D network."""
    dataset = tiny_copy(kind)
    folder = dataset.raw / "imagesUn"
    images = {
        "volume": write(folder / "volume_0000.nii.gz", IMAGE, 1.2, 1.1, 1.0),
        "slice_5mm": write(folder / "slice_5mm_0000.nii.gz", IMAGE[:1], 1.2, 1.2, 5.0),
        "slice_999mm": write(folder / "slice_999mm_0000.nii.gz", IMAGE[:1, :10, :10], 1.2, 1.2, 999.0),
        "thin_999mm": write(folder / "thin_999mm_0000.nii.gz", IMAGE[:1, :10, :10], 0.9, 0.9, 999.0),
    }
    if kind == "2d":
        images["flat"] = write(folder / "flat_0000.nii.gz", IMAGE[0], 0.9, 1.3)
    manager = PlansManager(dataset.plans)
    prepared = prepare_unlabeled(
        dataset.name, manager, dataset.configuration, dataset.dataset_json, dataset.cases("imagesTr"), 1
    )
    assert set(images) < set(prepared.cases)

    configuration = manager.get_configuration(dataset.configuration)
    for case, file in images.items():
        expected, *_ = configuration.preprocessor_class(verbose=False).run_case(
            [file], None, manager, configuration, dataset.dataset_json
        )
        data, *_ = nnUNetDatasetBlosc2(prepared.places[case], [case]).load_case(case)
        np.testing.assert_array_equal(data[:], expected)


def test_damaged_images_are_refused_with_a_remedy(tiny, tmp_path):
    dataset = tiny("3d")
    plans = CheckingPlans(dataset.plans, 1, dataset.configuration)
    file = Path(write(tmp_path / "x_0000.nii.gz", IMAGE))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(BadImageError, match=r"x_0000.nii.gz cannot be read \(.+\)\. It may be cut off or damaged: rep"):
        plans.image_reader_writer_class().read_images([str(file)])
    write(file, IMAGE * 1e30)
    with pytest.raises(BadImageError, match=r"too large for nnU-Net, .* in float32\. Rescale them, or remove the case"):
        plans.image_reader_writer_class().read_images([str(file)])
