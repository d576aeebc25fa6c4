"""Registration libraries on labeled pairs: Dice of one warped label against the fixed image's own, time, folding.

    python scripts/compare_registration.py --data ../shared/data/hippocampus --spacing 2 2 2 --pairs 12
    python scripts/compare_registration.py --data ../shared/data/la --spacing 2.5 2.5 2.5 --pairs 8
    python scripts/compare_registration.py --data ../shared/data/acdc --spacing 3 3 0 --pairs 12

The folder holds ``images``, ``labels`` and ``protocol.json``, as ``nnUNetv2_ssl_dataset hippocampus -h`` has it. Moving
images are the first five of the first order, fixed ones are drawn from the rest; their labels are read to judge alone.
Images are resampled to ``--spacing`` (x, y, z in mm, 0 leaves an axis), z-scored, and share their middles. Seconds are
CPU seconds per pair; set OMP_NUM_THREADS=1 and ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1. Libraries that are not installed
are left out. ``ours`` is ``nnunet_ssl.shapes``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.files import read_json, write_json
from nnunet_ssl.shapes.registration import Volume, array, folding, register, volume, warp_labels

Warped = tuple[np.ndarray, sitk.Transform | None]  # labels [z, y, x] on the fixed grid; a transform, where there is one


def ours(fixed: Volume, moving: Volume) -> Warped:
    """The package's own default."""
    transform = register(fixed, moving).transform
    return array(warp_labels(moving.labels, fixed.channels[0], transform)), transform


def identity(fixed: Volume, moving: Volume) -> Warped:
    """No registration: the middles of the images coincide."""
    transform = sitk.TranslationTransform(3)
    return array(warp_labels(moving.labels, fixed.channels[0], transform)), transform


def affine(fixed: Volume, moving: Volume) -> Warped:
    """SimpleITK, affine by correlation."""
    transform = _affine(fixed, moving)
    return array(warp_labels(moving.labels, fixed.channels[0], transform)), transform


def affine_bspline(fixed: Volume, moving: Volume) -> Warped:
    """SimpleITK, affine, then a cubic B-spline of about 15 mm by correlation."""
    start, grid = _affine(fixed, moving), fixed.channels[0]
    extent = [n * s for n, s in zip(grid.GetSize(), grid.GetSpacing(), strict=True)]
    spline = sitk.BSplineTransformInitializer(grid, [max(1, round(e / 15) - 1) for e in extent], 3)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMovingInitialTransform(start)
    method.SetInitialTransform(spline, inPlace=True)
    method.SetOptimizerAsLBFGSB(1e-5, 40)
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.Execute(grid, moving.channels[0])
    transform = sitk.CompositeTransform([start, spline])
    return array(warp_labels(moving.labels, grid, transform)), transform


def _affine(fixed: Volume, moving: Volume) -> sitk.Transform:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 60)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    transform = sitk.AffineTransform(3)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed.channels[0], moving.channels[0])
    return transform


def elastix(fixed: Volume, moving: Volume) -> Warped:
    """ITK-elastix, its default affine and B-spline maps, 100 iterations."""
    import itk

    def convert(image: sitk.Image) -> object:
        made = itk.GetImageFromArray(sitk.GetArrayFromImage(image).astype(np.float32))
        made.SetSpacing(image.GetSpacing())
        made.SetOrigin(image.GetOrigin())
        return made

    maps = itk.ParameterObject.New()
    for kind in ("affine", "bspline"):
        options = maps.GetDefaultParameterMap(kind, 2, 15.0)
        options["MaximumNumberOfIterations"], options["NumberOfSpatialSamples"] = ["100"], ["2048"]
        maps.AddParameterMap(options)
    _, found = itk.elastix_registration_method(
        convert(fixed.channels[0]), convert(moving.channels[0]), parameter_object=maps, number_of_threads=1
    )
    for number in range(found.GetNumberOfParameterMaps()):
        options = found.GetParameterMap(number)
        options["ResampleInterpolator"] = ["FinalNearestNeighborInterpolator"]
        options["FinalBSplineInterpolationOrder"] = ["0"]
        found.SetParameterMap(number, options)
    labels = itk.transformix_filter(convert(moving.labels), transform_parameter_object=found)
    return np.asarray(labels).astype(int), None


def greedy(fixed: Volume, moving: Volume) -> Warped:
    """picsl-greedy: affine, then its diffeomorphic registration, by local correlation."""
    from picsl_greedy import Greedy3D

    tool = Greedy3D()
    images = {"f": fixed.channels[0], "m": moving.channels[0]}
    tool.execute("-threads 1 -i f m -a -ia-image-centers -n 60x30 -m NCC 2x2x2 -o aff -V 0", **images, aff=None)
    tool.execute("-threads 1 -i f m -it aff -n 60x30 -m NCC 2x2x2 -s 2vox 1vox -o w -V 0", w=None)
    labels = sitk.Cast(moving.labels, sitk.sitkFloat32)
    tool.execute("-threads 1 -rf f -ri NN -rm l r -r w aff", l=labels, r=None)
    return array(tool["r"]).astype(int), None


def ants_syn(fixed: Volume, moving: Volume) -> Warped:
    """ANTsPy: SyN, 40 and 20 iterations."""
    import ants

    def convert(image: sitk.Image) -> object:
        values = sitk.GetArrayFromImage(image).astype(np.float32).T
        return ants.from_numpy(values, spacing=image.GetSpacing(), origin=image.GetOrigin())

    one, other = convert(fixed.channels[0]), convert(moving.channels[0])
    start = {"aff_iterations": (200, 100), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)}
    found = ants.registration(one, other, "SyN", reg_iterations=(40, 20), **start)
    labels = ants.apply_transforms(one, convert(moving.labels), found["fwdtransforms"], "nearestNeighbor")
    return labels.numpy().T.astype(int), None


def convex_adam(fixed: Volume, moving: Volume) -> Warped:
    """convexAdam with MIND features on the CPU, after the affine step above."""
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt
    from scipy.ndimage import map_coordinates

    torch.set_num_threads(1)
    start, grid = _affine(fixed, moving), fixed.channels[0]
    image = sitk.Resample(moving.channels[0], grid, start, sitk.sitkLinear)
    labels = array(warp_labels(moving.labels, grid, start))
    field = convex_adam_pt(
        img_fixed=torch.from_numpy(array(grid)), img_moving=torch.from_numpy(array(image)), grid_sp=3, disp_hw=3,
        grid_sp_adam=2, selected_niter=40, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    points = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij")) + np.moveaxis(field, -1, 0)
    return map_coordinates(labels, points, order=0), None


METHODS: tuple[Callable[[Volume, Volume], Warped], ...] = (
    identity, affine, affine_bspline, ours, elastix, greedy, ants_syn, convex_adam
)  # fmt: skip


def read(folder: Path, case: str, spacing: list[float]) -> Volume:
    """An image and its label, resampled and z-scored."""
    image = sitk.ReadImage(str(folder / "images" / f"{case}.nii.gz"), sitk.sitkFloat32)
    labels = sitk.ReadImage(str(folder / "labels" / f"{case}.nii.gz"), sitk.sitkInt16)
    labels.CopyInformation(image)
    wanted = [new or old for new, old in zip(spacing, image.GetSpacing(), strict=True)]
    size = [max(1, round(n * s / w)) for n, s, w in zip(image.GetSize(), image.GetSpacing(), wanted, strict=True)]
    where = (size, sitk.Transform())
    rest = (image.GetOrigin(), wanted, image.GetDirection(), 0.0)
    values = array(sitk.Resample(image, *where, sitk.sitkBSpline, *rest))
    values = (values - values.mean()) / values.std()
    return volume(
        values[None], tuple(wanted[::-1]), array(sitk.Resample(labels, *where, sitk.sitkNearestNeighbor, *rest))
    )


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the classes of ``other``."""
    classes = np.unique(other[other > 0])
    return float(
        np.mean([2 * ((one == k) & (other == k)).sum() / ((one == k).sum() + (other == k).sum()) for k in classes])
    )


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, and write what it says as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--spacing", type=float, nargs=3, required=True)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--methods", nargs="*", default=[method.__name__ for method in METHODS])
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    protocol = read_json(args.data / "protocol.json", "It comes with the data.")
    order = protocol["labeled_order"][0]
    cases_of = protocol.get("cases_of_patient", {name: [name] for name in order})
    drawn = np.random.default_rng(1).permutation(len(order) - 5)[: args.pairs]
    names = [(cases_of[order[i % 5]], cases_of[order[5 + j]]) for i, j in enumerate(drawn)]
    names = [(one[i % len(one)], other[i % len(other)]) for i, (one, other) in enumerate(names)]
    pairs = [tuple(read(args.data, case, args.spacing) for case in pair) for pair in names]
    rows = {}
    print("| Method | Dice | Lowest | CPU seconds per pair | Folding |\n| --- | ---: | ---: | ---: | ---: |")
    for method in METHODS:
        if method.__name__ not in args.methods:
            continue
        scores, folds, start = [], [], time.process_time()
        try:
            for moving, fixed in pairs:
                labels, transform = method(fixed, moving)
                scores.append(dice(labels, array(fixed.labels)))
                folds += [] if transform is None else [folding(fixed.channels[0], transform)]
        except ImportError as error:
            print(f"| {method.__name__} | not installed ({error.name}) | | | |", flush=True)
            continue
        except RuntimeError as error:  # of ANTs, where it finds no step
            print(
                f"| {method.__name__} | fails on pair {len(scores) + 1} of {len(pairs)} ({error}) | | | |", flush=True
            )
            continue
        seconds = (time.process_time() - start) / len(pairs)
        rows[method.__name__] = {
            "dice": scores, "seconds": seconds, "folding": max(folds) if folds else None
        }  # fmt: skip
        told = "" if not folds else f"{100 * max(folds):.2f} %"
        print(f"| {method.__name__} | {np.mean(scores):.3f} | {min(scores):.3f} | {seconds:.2f} | {told} |", flush=True)
    if args.o:
        write_json(args.o, {"data": args.data.name, "spacing": args.spacing, "pairs": names, "methods": rows})


if __name__ == "__main__":
    main()
