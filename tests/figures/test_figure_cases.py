"""Figure 1 shows what is in the files, where it is, with the numbers of the caption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.figure_folders import SPACING, TRAINERS, MadeUp, everything, make_folders, set_environment, write
from matplotlib.colors import to_rgb

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.cases import cases_figure, draw_cases, file_name, read_planes, window_around
from nnunet_ssl.figures.options import FigureOptions
from nnunet_ssl.figures.outlines import edges
from nnunet_ssl.figures.page import class_colors
from nnunet_ssl.figures.planes import OpenCase, Plane, in_gray, upright
from nnunet_ssl.figures.predictions import with_predictions
from nnunet_ssl.figures.slices import choose_slices, measure_all_slices
from nnunet_ssl.figures.test_set import Case


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    set_environment(monkeypatch, tmp_path)
    return make_folders(tmp_path)


def planes_of(slices: list, runs: list, options: FigureOptions) -> list[Plane]:
    planes = read_planes(slices, runs, options)
    return [planes[s.case.name, s.index] for s in slices]


def test_what_is_drawn_is_what_the_files_hold(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    runs = with_predictions(runs, cases, made.out, options)
    slices = choose_slices(measure_all_slices(runs, cases, options), 1)
    planes = planes_of(slices, runs, options)
    figure = cases_figure(slices, planes, [run.name for run in runs], 2, options)
    grid = np.array(figure.axes).reshape(3, 3)
    assert [axes.get_title() for axes in grid[0]] == ["Image, truth", "LabeledOnly", "SHTA_CPS"]
    color = to_rgb(class_colors(2)[1])
    for row, chosen in zip(grid, slices, strict=True):
        assert row[0].get_ylabel() == chosen.rank
        assert len(row[0].images) == 1
        for axes, trainer, dice in zip(row[1:], TRAINERS, chosen.dice, strict=True):
            truth = made.truth(chosen.case.name)[chosen.index] == 2
            guess = made.prediction(trainer, chosen.case.name)[chosen.index] == 2
            overlay = axes.images[1].get_array()
            drawn = (overlay[..., 3] > 127) & np.isclose(overlay[..., :3] / 255, color, atol=1e-2).all(-1)
            assert np.array_equal(drawn, guess)
            wanted = 200 * (truth & guess).sum() / (truth.sum() + guess.sum())
            assert 100 * dice == pytest.approx(wanted)
            assert axes.texts[0].get_text() == f"{wanted:.1f}"
            (outline,) = axes.patches
            segments = outline.get_path().vertices.reshape(-1, 2, 2)
            np.testing.assert_allclose(segments, edges(truth) * (SPACING[2], SPACING[1]))


def test_files_and_caption(made: MadeUp) -> None:
    runs, cases, options = everything(made, ["core"])
    draw_cases(runs, cases, made.out, options)
    assert sorted(f.name for f in made.out.iterdir()) == [f"cases_2_core.{kind}" for kind in ("md", "pdf", "png")]
    caption = (made.out / "cases_2_core.md").read_text(encoding="utf-8")
    for run in runs:
        assert f"`{run.fold_folder / 'validation'}`" in caption
        assert f"`{run.checkpoint_file}`" in caption
    assert f"3 validation cases, truth from `{made.raw / 'labelsTr'}`" in caption
    runs = with_predictions(runs, cases, made.out, options)
    for s in choose_slices(measure_all_slices(runs, cases, options), 0):
        assert f"| {s.rank} | {s.case.name} | {s.index} | {100 * s.dice[0]:.1f} | {100 * s.dice[1]:.1f} |" in caption


def test_a_class_that_no_case_has(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cases, options = everything(made)
    monkeypatch.setitem(options.labels, "spleen", 9)
    options.classes.append(9)
    draw_cases(runs, cases, made.out, options)
    assert not list(made.out.glob("cases_9*"))
    options.classes[:] = [9]
    with pytest.raises(UserError, match=r"3 validation cases.* has any of the classes spleen"):
        draw_cases(runs, cases, made.out, options)


def test_files_are_read_once_for_all_classes(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, cases, options = everything(made)
    read, reader = [], type(runs[0].reader)
    own = reader.read_images
    monkeypatch.setattr(reader, "read_images", lambda self, files: read.append(files) or own(self, files))
    monkeypatch.setattr(reader, "read_seg", lambda self, file: own(self, [file]))
    draw_cases(runs, cases, made.out, options)
    assert len(read) == len({tuple(files) for files in read}) <= len(cases)


def test_an_image_of_another_shape_is_named(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    for case in cases:
        write(np.zeros((3, 4, 5), np.float32), case.images[0])
    with pytest.raises(UserError, match=r"_0000.nii.gz has slices of the shape \(3, 4, 5\), the truth \(7, 12, 10\)"):
        draw_cases(runs, cases, made.out, options)


def test_names_of_files() -> None:
    assert file_name(3, "left kidney/L") == "cases_3_left_kidney_L"
    assert file_name((1, 2), "whole") == "cases_1-2_whole"


def test_a_slice_does_not_keep_its_volume(made: MadeUp) -> None:
    runs, cases, options = everything(made)
    plane = OpenCase(cases[0], with_predictions(runs, cases, made.out, options), options).plane(1)
    for array in (plane.image, plane.truth, *plane.predictions):
        while array.base is not None:
            array = array.base
        assert array.nbytes <= 3 * plane.image.nbytes


# ------------------------------------------------------------------------------------------------------ which way up

LPS = np.eye(3)
RAS = np.diag([-1.0, -1.0, 1.0])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("direction", [LPS, RAS, np.diag([1.0, -1.0, -1.0]), LPS[:, [1, 2, 0]]])
def test_front_or_head_is_up_and_the_patients_left_on_the_right(axis: int, direction: np.ndarray) -> None:
    """The volume holds the place of each voxel in the patient; the turned slice must show it grow the right way."""
    index = np.stack(np.meshgrid(*[np.arange(4.0)] * 3, indexing="ij"))[::-1]  # x, y, z of arrays [z, y, x]
    place = np.einsum("ij,j...->i...", direction, index)  # to the left, back, head
    axes, flips = upright({"sitk_stuff": {"direction": tuple(direction.flat)}}, axis)
    shown = place.transpose(0, *(a + 1 for a in (axis, *axes)))[:, 1][:, flips[0], flips[1]]
    spaces = []
    for steps in (shown[:, 1, 0] - shown[:, 0, 0], shown[:, 0, 1] - shown[:, 0, 0]):
        spaces.append(int(np.abs(steps).argmax()))
        assert np.sign(steps[spaces[-1]]) == (-1 if spaces[-1] == 2 else 1)
    assert spaces[0] > spaces[1]  # rows go down the patient or to the back, columns not


def test_nibabels_axes_point_the_other_way() -> None:
    same = {"nibabel_stuff": {"original_affine": np.diag([-2.0, -2.0, 3.0, 1.0])}}
    for axis in range(3):
        assert upright(same, axis) == upright({"sitk_stuff": {"direction": tuple(LPS.flat)}}, axis)


def test_pictures_without_a_patient_are_left_as_they_are() -> None:
    as_it_is = ((1, 2), (slice(None), slice(None)))
    assert upright({"spacing": (999, 1, 1)}, 0) == as_it_is
    assert upright({"sitk_stuff": {"direction": (1, 0, 0, 1)}}, 0) == as_it_is


# ---------------------------------------------------------------------------------------------------- window, grays


@pytest.mark.parametrize(
    ("where", "size", "window"),
    [
        ((slice(40, 60), slice(45, 55)), (1.0, 1.0), (30, 70, 70, 30)),  # twice the longer side
        ((slice(49, 51), slice(49, 51)), (1.0, 1.0), (35, 65, 65, 35)),  # at least 30 % of the image
        ((slice(0, 20), slice(90, 100)), (1.0, 1.0), (60, 100, 40, 0)),  # moved into the image
        ((slice(10, 90), slice(10, 90)), (1.0, 1.0), (0, 100, 100, 0)),  # no larger than the image
        ((slice(40, 60), slice(45, 55)), (3.0, 1.0), (-10, 110, 210, 90)),  # mm, not voxels; the image is narrower
    ],
)
def test_window(where: tuple, size: tuple, window: tuple) -> None:
    mask = np.zeros((100, 100), bool)
    mask[where] = True
    assert window_around(mask, size) == pytest.approx(window)


def test_ct_is_shown_in_the_plans_window(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _, options = everything(made)
    image = np.linspace(0, 1000, 1001).reshape(1, 7, 143)
    gray = in_gray(image, runs[0], options)
    assert (gray.min(), gray.max()) == (0, 1)
    assert gray.flat[5] == 0
    assert gray.flat[500] == pytest.approx(0.5)

    file = runs[0].folder / "plans.json"
    window = {"0": {"percentile_00_5": 100.0, "percentile_99_5": 300.0}}
    plans = json.loads(file.read_text()) | {"foreground_intensity_properties_per_channel": window}
    file.write_text(json.dumps(plans))
    monkeypatch.setitem(options.dataset_json, "channel_names", {"0": "CT"})
    assert in_gray(image, runs[0], options).flat[[99, 100, 200, 301]].tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize("names", [("R", "G", "B"), ("rgb_to_0_1",) * 3])
def test_color_images_are_shown_in_color(names: tuple, made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _, options = everything(made)
    monkeypatch.setitem(options.dataset_json, "channel_names", dict(zip("012", names, strict=True)))
    image = np.random.default_rng(0).integers(2, 256, (3, 4, 5))
    assert np.allclose(in_gray(image, runs[0], options), np.moveaxis(image, 0, 2) / 255)


# --------------------------------------------------------------------------------------------- other kinds of images


def test_regions_are_drawn_as_their_labels_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, tmp_path)
    made = make_folders(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2})
    runs, cases, options = everything(made, ["whole"])
    runs = with_predictions(runs, cases, made.out, options)
    slices = choose_slices(measure_all_slices(runs, cases, options), 0)
    planes = planes_of(slices, runs, options)
    figure = cases_figure(slices, planes, [run.name for run in runs], (1, 2), options)
    guess = made.prediction(TRAINERS[0], slices[0].case.name)[slices[0].index]
    assert np.array_equal(figure.axes[1].images[1].get_array()[..., 3] > 0, guess > 0)


def test_a_2d_dataset_of_color_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net reads them as one slice with an enormous spacing, and three channels from one file."""
    set_environment(monkeypatch, tmp_path)
    made = make_folders(tmp_path, num_cases=1)
    rng = np.random.default_rng(0)
    picture, truth = rng.integers(0, 256, (30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    truth[5:20, 8:30] = 1
    guess = np.roll(truth, 3, 1)
    runs, _, options = everything(made, ["shell"])
    options.dataset_json.update(file_ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    (runs[0].folder / "plans.json").write_text('{"image_reader_writer": "NaturalImage2DIO", "configurations": {}}')
    files = {"image": picture, "label": truth, "a": guess}
    for name, array in files.items():
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(tmp_path / f"{name}.png"))
    (tmp_path / "a.png").rename(runs[0].fold_folder / "validation/a.png")
    case = Case("a", (tmp_path / "image.png",), tmp_path / "label.png", "validation")

    runs = with_predictions(runs[:1], [case], made.out, options)
    (chosen,) = choose_slices(measure_all_slices(runs, [case], options), 0)
    assert chosen.index == 0
    assert chosen.dice[0] == pytest.approx(19 / 22)
    plane = read_planes([chosen], runs, options)["a", 0]
    assert np.array_equal(plane.truth, truth)
    assert np.array_equal(plane.predictions[0], guess)
    assert np.allclose(plane.image, picture / 255)
    draw_cases(runs, [case], made.out, options)
    assert (made.out / "cases_1_shell.pdf").is_file()
