"""What all datasets share: labels on the grid of their images."""

from __future__ import annotations

import pytest
import SimpleITK as sitk

from nnunet_ssl.datasets.cases import Files
from nnunet_ssl.datasets.recipe import align_by_header, align_by_voxels
from nnunet_ssl.volumes import VolumeError


def test_a_slice_too_many_is_another_size_however_many_there_are():
    image, label = sitk.Image(2, 2, 2000, sitk.sitkInt16), sitk.Image(2, 2, 2001, sitk.sitkUInt8)
    for align in (align_by_header, align_by_voxels):
        with pytest.raises(VolumeError, match="differ in size: 2 x 2 x 2000 and 2 x 2 x 2001"):
            align(label, image)


@pytest.mark.parametrize(("shift", "fits"), [((0.2, 0, 2), True), ((0.4, 0, 0), False), ((0, 0, 3), False)])
def test_origins_may_differ_by_half_a_voxel_of_each_axis(shift, fits):
    image, label = sitk.Image(4, 4, 4, sitk.sitkInt16), sitk.Image(4, 4, 4, sitk.sitkUInt8)
    for content in (image, label):
        content.SetSpacing((0.7, 0.7, 5))
    label.SetOrigin(shift)
    if fits:
        assert align_by_header(label, image).GetOrigin() == image.GetOrigin()
    else:
        with pytest.raises(VolumeError, match="differ in origin"):
            align_by_header(label, image)


def test_files_in_linked_folders_are_found_and_hidden_ones_are_not(tmp_path):
    """25 GB are not copied; a link may lead back up."""
    archive, data = tmp_path / "archive", tmp_path / "data"
    for file in (archive / "a.nii.gz", archive / "._a.nii.gz", data / ".snapshot" / "a.nii.gz"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (data / "imagesTr").symlink_to(archive)
    (archive / "up").symlink_to(data)
    assert Files(data, "imagesTr/{}.nii.gz").found == {"a": {data / "imagesTr" / "a.nii.gz"}}
