"""Files that nnU-Net's readers take for whole, and voxels that come to nothing in float32, are refused by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from skimage.io import imsave

from nnunet_ssl.volumes import VolumeError, read_volume

IMAGE = np.random.default_rng(0).normal(100, 10, (8, 9, 10)).astype(np.float32)
SINGLE, PAIR = nibabel.Nifti1Image, nibabel.Nifti1Pair


def nifti(array: np.ndarray, kind: type = SINGLE, slope: float = 1, inter: float = 0, order: str = "<") -> bytes:
    """An uncompressed NIfTI file with these stored voxels."""
    header = kind.header_class(endianness=order)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype.newbyteorder(order))
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["pixdim"][1:4] = 1
    voxels = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    return header.binaryblock + bytes(4) + voxels


def write(folder: Path, name: str, content: bytes) -> str:
    file = folder / name
    file.write_bytes(content)
    return str(file)


def patched(content: bytes, offset: int, form: str, *values: object) -> bytes:
    """``content`` with other values in its header."""
    new = struct.pack(form, *values)
    return content[:offset] + new + content[offset + len(new) :]


def read(file: str, reader: type = SimpleITKIO) -> np.ndarray:
    return read_volume(reader().read_images, [file])[0]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


# ------------------------------------------------------------------ length

WHOLE = nifti(IMAGE)
MAGIC, OFFSET, DIM, DATATYPE = 344, 108, 40, 70  # places in the header
CUT = {
    "uncompressed under .nii.gz": ("x.nii.gz", half(WHOLE)),
    "uncompressed": ("x.nii", half(WHOLE)),
    "half of the voxels in a whole gzip stream": ("x.nii.gz", gzip.compress(half(WHOLE))),
    "one voxel short": ("x.nii.gz", gzip.compress(WHOLE[:-4])),
    "gzip stream": ("x.nii.gz", half(gzip.compress(WHOLE))),
    "wrong magic": ("x.nii", half(patched(WHOLE, MAGIC, "4s", b"n+2"))),
    "wrong magic in gzip": ("x.nii.gz", gzip.compress(half(patched(WHOLE, MAGIC, "4s", b"xxxx")))),
    "magic of a pair": ("x.nii.gz", gzip.compress(half(patched(WHOLE, MAGIC, "4s", b"ni1")))),
    "vox_offset NaN": ("x.nii", half(patched(WHOLE, OFFSET, "<f", np.nan))),
    "vox_offset -5": ("x.nii", half(patched(WHOLE, OFFSET, "<f", -5))),
    "vox_offset infinite": ("x.nii", half(patched(WHOLE, OFFSET, "<f", np.inf))),
    "vox_offset 0": ("x.nii", patched(WHOLE, OFFSET, "<f", 0)),
    "vox_offset beyond the file": ("x.nii", patched(WHOLE, OFFSET, "<f", 1e6)),
    "more slices than there are": ("x.nii", patched(WHOLE, DIM, "<4h", 3, 8, 9, 32000)),
    "no slice": ("x.nii", patched(WHOLE, DIM, "<4h", 3, 8, 9, 0)),
    "wider voxels than there are": ("x.nii", patched(WHOLE, DATATYPE, "<2h", 64, 64)),
    "colors": ("x.nii", half(nifti(np.zeros((8, 9, 10), [(c, "u1") for c in "RGB"])))),
    "big endian": ("x.nii", half(nifti(IMAGE, order=">"))),
    "NIfTI-2": ("x.nii", half(nifti(IMAGE, nibabel.Nifti2Image))),
    "a text": ("x.nii.gz", b"hello"),
    "nothing": ("x.nii.gz", b""),
}


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize("name", CUT)
def test_a_nifti_file_shorter_than_its_header_promises(tmp_path, name, reader):
    file = write(tmp_path, *CUT[name])
    with pytest.raises(VolumeError, match=r"/x.nii(.gz)? cannot be read \(.+\)$") as error:
        read(file, reader)
    assert error.value.remedy == "It may be cut off or damaged: replace or remove it."


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_cut_is_noticed(tmp_path, ending, kept):
    content = gzip.compress(WHOLE) if ending == ".nii.gz" else WHOLE
    file = write(tmp_path, f"x{ending}", content[: int(kept * len(content))])
    with pytest.raises(VolumeError, match="cannot be read"):
        read(file)


def test_uncompressed_under_the_name_of_a_compressed_one(tmp_path):
    """Even a whole one: SimpleITK reads other voxels from it."""
    with pytest.raises(VolumeError, match="is not a gzip file"):
        read(write(tmp_path, "x.nii.gz", WHOLE))


@pytest.mark.parametrize("name", ["x.hdr", "x.img"])
@pytest.mark.parametrize("kind", [PAIR, nibabel.Spm99AnalyzeImage])
def test_two_files(tmp_path, name, kind):
    nibabel.save(kind(IMAGE, np.eye(4)), tmp_path / "x.hdr")
    assert read(str(tmp_path / name)).shape == (1, 10, 9, 8)
    voxels = tmp_path / "x.img"
    voxels.write_bytes(half(voxels.read_bytes()))
    with pytest.raises(VolumeError, match=rf"{name} cannot be read \(1440 bytes where its header promises 2880\)"):
        read(str(tmp_path / name))


def test_a_flipped_bit_in_a_compressed_file_is_noticed(tmp_path):
    content = bytearray(gzip.compress(WHOLE))
    content[-6] ^= 1  # the checksum
    with pytest.raises(VolumeError, match="CRC check failed"):
        read(write(tmp_path, "x.nii.gz", bytes(content)))


@pytest.mark.parametrize("ending", [".gipl", ".gipl.gz", ".nrrd", ".mha", ".mhd", ".nhdr", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_other_formats_of_simpleitk(tmp_path, ending, dtype):
    file = tmp_path / f"x{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(IMAGE.astype(dtype)), str(file))
    np.testing.assert_array_equal(read(str(file))[0], IMAGE.astype(dtype))
    largest = max(tmp_path.iterdir(), key=lambda part: part.stat().st_size)
    largest.write_bytes(half(largest.read_bytes()))
    with pytest.raises(VolumeError, match=rf"x{ending} cannot be read"):
        read(str(file))


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"imagej": True}, {"compression": "zlib"}], ids=str)
def test_a_stack_of_pages(tmp_path, options):
    """Without tifffile's own metadata nothing but the chain of pages says how many there are."""
    tifffile.imwrite(tmp_path / "x.tif", IMAGE.astype(np.uint8), **options)
    content = (tmp_path / "x.tif").read_bytes()
    assert read(str(tmp_path / "x.tif"), Tiff3DIO).shape == (1, 8, 9, 10)
    for share in (0.5, 0.9):
        file = write(tmp_path, "x.tif", content[: int(share * len(content))])
        with pytest.raises(VolumeError, match=r"x\.tif cannot be read"):
            read(file, Tiff3DIO)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_pictures(tmp_path, ending):
    file = tmp_path / f"x{ending}"
    imsave(str(file), IMAGE[0].astype(np.uint8), check_contrast=False)
    np.testing.assert_array_equal(read(str(file), NaturalImage2DIO)[0, 0], IMAGE[0].astype(np.uint8))
    file.write_bytes(half(file.read_bytes()))
    with pytest.raises(VolumeError, match=rf"x{ending} cannot be read"):
        read(str(file), NaturalImage2DIO)


# ------------------------------------------------------------------ voxels


@pytest.mark.parametrize(
    ("dtype", "order", "kind"),
    [("f4", "<", SINGLE), ("f4", ">", SINGLE), ("f8", "<", SINGLE), ("f8", ">", nibabel.Nifti2Image)],
)
def test_voxels_that_are_not_finite_are_counted(tmp_path, dtype, order, kind):
    """SimpleITK reads them as 0."""
    reader = SimpleITKIO if kind is SINGLE else NibabelIO  # SimpleITK does not read NIfTI-2
    array = IMAGE.astype(dtype)
    np.testing.assert_array_equal(read(write(tmp_path, "x.nii", nifti(array, kind, order=order)), reader)[0].T, IMAGE)
    array[1, 2, 3:5] = np.nan, np.inf
    file = write(tmp_path, "x.nii", nifti(array, kind, order=order))
    with pytest.raises(VolumeError, match=r"x\.nii: 2 voxel\(s\) are NaN or infinite$") as error:
        read(file, reader)
    assert error.value.remedy.startswith("Replace them by a value that makes sense")


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize(
    ("array", "scaling", "message"),
    [
        (np.full((3, 3, 3), 1e39), (1, 0), r"27 voxel\(s\) are NaN or infinite in float32"),
        (np.full((3, 3, 3), 9, np.int16), (3e38, 0), r"27 voxel\(s\) are NaN or infinite in float32"),
        (np.full((3, 3, 3), 9, np.int16), (1e37, 3e38), r"27 voxel\(s\) are NaN or infinite in float32"),
        (np.full((3, 3, 3), 3e38, np.float32), (1, 0), r"voxels as large as 3e\+38 are too large"),
        (np.full((3, 3, 3), 9, np.int16), (1, 1e20), r"voxels as large as 1e\+20 are too large"),
        (np.full((3, 3, 3), 1e-50), (1, 0), "its voxels are so small that all of them are 0 in float32"),
    ],
)
def test_voxels_beyond_float32(tmp_path, array, scaling, message, reader):
    with pytest.raises(VolumeError, match=rf"x\.nii: {message}"):
        read(write(tmp_path, "x.nii", nifti(array, SINGLE, *scaling)), reader)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39, -3e38])
def test_voxels_of_other_formats(tmp_path, ending, value):
    array = IMAGE.astype(float)
    array[1, 2, 3] = value
    file = str(tmp_path / f"x{ending}")
    sitk.WriteImage(sitk.GetImageFromArray(array), file)
    with pytest.raises(VolumeError, match=rf"x{ending}: (1 voxel\(s\) are NaN or infinite|voxels as large as 3e\+38)"):
        read(file)


def test_what_is_let_through_can_be_normalized(tmp_path):
    """The bound is where nnU-Net's z-score stops working; right below it, it works."""
    pattern = IMAGE / np.abs(IMAGE).max()
    fits = np.float32(0.9 * np.sqrt(np.finfo(np.float32).max / np.square(pattern).sum()))
    normalized = ZScoreNormalization(False, {}).run(read(write(tmp_path, "x.nii", nifti(pattern * fits))))
    assert abs(float(normalized.std()) - 1) < 1e-3
    with pytest.raises(VolumeError, match="too large"):
        read(write(tmp_path, "x.nii", nifti(pattern * fits * np.float32(1.2))))


@pytest.mark.parametrize("scaling", [(1, 0), (np.nan, np.nan), (0, 0), (0.5, -2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_images_pass_as_they_are(tmp_path, dtype, scaling):
    content = nifti(IMAGE.astype(dtype), SINGLE, *scaling)
    for name, whole in (("x.nii", content), ("x.nii.gz", gzip.compress(content)), ("X.NII", content + b"more")):
        file = write(tmp_path, name, whole)
        images, properties = read_volume(SimpleITKIO().read_images, [file])
        expected, expected_properties = SimpleITKIO().read_images([file])
        np.testing.assert_array_equal(images, expected)
        assert properties == expected_properties


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_an_image_of_zeros_passes(tmp_path, dtype):
    """Slices at the ends of a volume are black."""
    assert not read(write(tmp_path, "x.nii", nifti(np.zeros((3, 4, 5), dtype)))).any()
    assert not read(write(tmp_path, "x.nii", nifti(np.full((3, 4, 5), 5, dtype), SINGLE, 1, -5))).any()


# ------------------------------------------------------------------ channels


def test_the_channel_that_is_broken_is_named(tmp_path):
    files = [str(tmp_path / f"case_{channel:04d}.nrrd") for channel in range(2)]
    for file in files:
        sitk.WriteImage(sitk.GetImageFromArray(IMAGE), file)
    array = IMAGE.copy()
    array[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array), files[1])
    with pytest.raises(VolumeError, match=r"case_0001.nrrd: 1 voxel"):
        read_volume(SimpleITKIO().read_images, files)
    with open(files[1], "rb+") as stream:
        stream.truncate(500)
    with pytest.raises(VolumeError, match=r"case_0001.nrrd cannot be read"):
        read_volume(SimpleITKIO().read_images, files)
    sitk.WriteImage(sitk.GetImageFromArray(IMAGE[1:]), files[1])
    with pytest.raises(VolumeError, match=r"case_0000.nrrd and its other channels do not fit .*not have|same shape"):
        read_volume(SimpleITKIO().read_images, files)


# ------------------------------------------------------------------ what the readers do by themselves


def test_the_readers_would_have_said_nothing(tmp_path):
    """If this fails, they have learned it, and a check of ours can go."""
    file = write(tmp_path, "x.nii", half(WHOLE))
    assert SimpleITKIO().read_images([file])[0].shape == (1, 10, 9, 8)
    array = IMAGE.copy()
    array[1, 2, 3] = np.nan
    assert SimpleITKIO().read_images([write(tmp_path, "x.nii", nifti(array))])[0][0, 3, 2, 1] == 0
    assert not np.array_equal(SimpleITKIO().read_images([write(tmp_path, "x.nii.gz", WHOLE)])[0][0].T, IMAGE)
    sitk.WriteImage(sitk.GetImageFromArray(IMAGE), str(tmp_path / "x.gipl"))
    file = write(tmp_path, "x.gipl", half((tmp_path / "x.gipl").read_bytes()))
    assert SimpleITKIO().read_images([file])[0].shape == (1, 8, 9, 10)
    for value in (3e38, 1e20):
        with np.errstate(all="ignore"):
            normalized = ZScoreNormalization(False, {}).run(IMAGE * np.float32(value / 150))
        assert not np.nan_to_num(normalized).any()
    tifffile.imwrite(tmp_path / "x.tif", IMAGE.astype(np.uint8), metadata=None, compression="zlib")
    content = (tmp_path / "x.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        end = tiff.pages[5].offset
    with contextlib.redirect_stdout(io.StringIO()):
        assert Tiff3DIO().read_images([write(tmp_path, "x.tif", content[:end])])[0].shape == (1, 5, 9, 10)


def test_too_little_memory_is_not_the_files_fault(tmp_path):
    def no_room(_):
        raise MemoryError("Unable to allocate 9.40 GiB")

    with pytest.raises(MemoryError):
        read_volume(no_room, [write(tmp_path, "a.nii", nifti(np.zeros((2, 2, 2), np.float32)))])
