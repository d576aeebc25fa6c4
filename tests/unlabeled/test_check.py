"""What must not be learnt from is refused, though SimpleITK would read it without a word."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.unlabeled.check import BadImageError, check_nifti, is_2d, read

IMAGE = np.random.default_rng(0).normal(100, 10, (8, 9, 10))


@pytest.fixture(params=[".nii", ".nii.gz"])
def nifti(request, tmp_path):
    """Writes an array as NIfTI and gives back the file."""

    def write(array: np.ndarray) -> str:
        file = str(tmp_path / f"case_0000{request.param}")
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), file)
        return file

    return write


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_every_cut_is_noticed(nifti, kept):
    file = nifti(IMAGE.astype(np.float32))
    with open(file, "rb") as stream:
        content = stream.read()
    with open(file, "wb") as stream:
        stream.write(content[: int(kept * len(content))])
    with pytest.raises(BadImageError, match=r"case_0000.nii(.gz)? cannot be read .*replace or remove it"):
        read(SimpleITKIO().read_images, [file])


def test_simpleitk_would_have_said_nothing(nifti):
    """If this fails, SimpleITK has learnt it, and check_nifti can go."""
    file = nifti(IMAGE.astype(np.float32))
    with open(file, "rb+") as stream:
        stream.truncate(2000)
    images, _ = SimpleITKIO().read_images([file])
    assert images.shape == (1, 10, 9, 8)
    array = IMAGE.astype(np.float32)
    array[1, 2, 3] = np.nan
    images, _ = SimpleITKIO().read_images([nifti(array)])
    assert images[0, 3, 2, 1] == 0


def test_a_flipped_bit_in_a_compressed_file_is_noticed(tmp_path):
    file = str(tmp_path / "case_0000.nii.gz")
    nibabel.save(nibabel.Nifti1Image(IMAGE.astype(np.float32), np.eye(4)), file)
    with open(file, "rb+") as stream:
        stream.seek(-6, 2)  # the checksum
        stream.write(b"\x00\x01")
    with pytest.raises(BadImageError, match="CRC check failed"):
        check_nifti(file)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_voxels_that_are_not_finite_are_counted(nifti, dtype):
    array = IMAGE.astype(dtype)
    check_nifti(nifti(array))
    array[1, 2, 3:5] = np.nan, np.inf
    with pytest.raises(BadImageError, match=r"case_0000.nii(.gz)?: 2 voxel\(s\) are NaN or infinite"):
        check_nifti(nifti(array))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_whole_images_pass(nifti, dtype):
    file = nifti(IMAGE.astype(dtype))
    images, properties = read(SimpleITKIO().read_images, [file])
    expected, expected_properties = SimpleITKIO().read_images([file])
    np.testing.assert_array_equal(images, expected)
    assert properties == expected_properties


def test_the_channel_that_is_broken_is_named(tmp_path):
    files = [str(tmp_path / f"case_{channel:04d}.nrrd") for channel in range(2)]
    for file in files:
        sitk.WriteImage(sitk.GetImageFromArray(IMAGE.astype(np.float32)), file)
    with open(files[1], "rb+") as stream:
        stream.truncate(500)
    with pytest.raises(BadImageError, match=r"case_0001.nrrd cannot be read"):
        read(SimpleITKIO().read_images, files)


def test_dimensions_by_the_readers_spacing(tmp_path):
    spacings = []
    for name, array in (("2d.nii.gz", IMAGE[0]), ("3d.nii.gz", IMAGE), ("one_slice.nii.gz", IMAGE[:1])):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing([0.7, 0.8, 5.0][: image.GetDimension()])
        sitk.WriteImage(image, str(tmp_path / name))
        spacings.append(SimpleITKIO().read_images([str(tmp_path / name)])[1]["spacing"])
    assert [is_2d(spacing) for spacing in spacings] == [True, False, False]
