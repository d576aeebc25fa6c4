"""Warps by hidden labels fit them, whatever the images show."""

from __future__ import annotations

import re
import shutil

import warp_by_hidden_labels


def test_warps_fit_the_hidden_labels(tiny_copy, capsys):
    dataset = tiny_copy("3d")
    prepared = dataset.preprocessed / f"{dataset.plans_name}_3d_fullres"
    truth = dataset.folders.preprocessed / "Dataset902_Truth" / prepared.name
    truth.mkdir(parents=True)
    for case in dataset.cases("imagesUn"):  # they look like what they are, and their labels are those of tr_01
        for file in prepared.glob("tr_01*"):
            shutil.copyfile(file, truth / file.name.replace("tr_01", case))
    arguments = ["-d", str(dataset.id), "-t", "902", "-c", "3d_fullres", "-p", dataset.plans_name, "--pairs", "2"]
    warp_by_hidden_labels.main(arguments)
    told = capsys.readouterr().out
    count, dice = re.search(r"(\d+) warps in .*; mean Dice of \d+ warped labels ([\d.]+)", told).groups()
    assert int(count) == 10
    assert float(dice) > 0.9
