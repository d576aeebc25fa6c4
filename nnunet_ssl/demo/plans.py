"""Plans small enough for a CPU, also as a command: ``python -m nnunet_ssl.demo.plans PLANS_FILE CONFIGURATION ...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, write_json

PLAN_AGAIN = "Plan again with nnUNetv2_plan_experiment."


def shrink_plans(
    plans_file: str | Path,
    configuration: str,
    features: Sequence[int],
    *,
    patch_size: Sequence[int] | None = None,
    batch_size: int = 2,
    convs_per_stage: int = 2,
) -> None:
    """Make the network of a configuration smaller, in the plans file itself.

    The first stages of the planned network stay with their kernels and strides, so an anisotropic plan stays
    anisotropic. What preprocessing reads (spacing, normalization, resampling) is left alone, so the images may be
    prepared before or after.

    Args:
        plans_file: nnU-Net's plans, a JSON file.
        configuration: for example ``3d_fullres``.
        features: channels of each stage that is kept, one number a stage.
        patch_size: voxels of each axis; the planned patch where it is None.
        batch_size: patches of a batch.
        convs_per_stage: convolutions of each stage, in encoder and decoder (residual blocks where the plans have them).

    Raises:
        UserError: the plans have no such configuration, or fewer stages than ``features`` asks for.
    """
    plans_file = Path(plans_file)
    plans = read_json(plans_file, PLAN_AGAIN, keys={"configurations": dict})
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UserError(f"{plans_file} has no configuration {configuration!r}; name one of {known}.")
    try:
        _shrink(plans["configurations"][configuration], features, patch_size, batch_size, convs_per_stage)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{plans_file}: {configuration} is not as nnU-Net plans it ({error!r}). {PLAN_AGAIN}"
        ) from error
    except ValueError as error:
        raise UserError(f"{plans_file}: {configuration} {error}") from None
    write_json(plans_file, plans)


def _shrink(
    config: dict[str, Any],
    features: Sequence[int],
    patch_size: Sequence[int] | None,
    batch_size: int,
    convs_per_stage: int,
) -> None:
    network = config["architecture"]["arch_kwargs"]
    stages = len(features)
    if network["n_stages"] < stages:
        raise ValueError(
            f"has {network['n_stages']} stages, fewer than the {stages} asked for; ask for fewer, or plan with larger "
            "images."
        )

    network["n_stages"] = stages
    network["features_per_stage"] = list(features)
    network["kernel_sizes"] = network["kernel_sizes"][:stages]
    network["strides"] = network["strides"][:stages]
    for blocks in ("n_conv_per_stage", "n_blocks_per_stage"):  # plain or residual encoder
        if blocks in network:
            network[blocks] = [convs_per_stage] * stages
    network["n_conv_per_stage_decoder"] = [convs_per_stage] * (stages - 1)

    if patch_size is not None:
        config["patch_size"] = list(patch_size)
    config["batch_size"] = batch_size


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_ssl.demo.plans",
        description="Make the network of a configuration smaller, in the plans file itself.",
    )
    parser.add_argument("plans_file", type=Path, help="nnU-Net's plans, a JSON file")
    parser.add_argument("configuration", help="For instance 3d_fullres")
    parser.add_argument("--features", type=int, nargs="+", required=True, help="Channels of each remaining stage")
    parser.add_argument("--patch-size", type=int, nargs="+", help="Voxels of each axis. Default: as planned")
    parser.add_argument("--batch-size", type=int, default=2, help="Patches per batch. Default: 2")
    shrink_plans(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
