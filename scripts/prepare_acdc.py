"""ACDC (cine MRI of the heart, two frames a patient) as an nnU-Net raw dataset with few labels.

    python scripts/prepare_acdc.py --data DIR --seed 0 --labeled 3 -d 780
    python scripts/prepare_acdc.py --data DIR --labeled all -d 789

DIR holds ``images`` and ``labels``, the same file names in both, ``<case>.nii.gz``, and ``protocol.json``, whose lists
name patients:

    {"train": ["p1", "p2", "p3"], "test": ["p4"], "labelled_order": [["p2", "p1", "p3"], ["p3", "p2", "p1"]],
     "cases_of_patient": {"p1": ["p1_frame01", "p1_frame12"], "p2": ...}}

``--labeled n`` counts patients: all cases of the first n patients of the order (``--seed``, from 0) keep their labels,
and no patient is in two parts. ``groups.json`` in the dataset says whose case each one is.

There is no validation list; the fold trains on all labelled cases and validates on the first five of them, by which
nothing is to be chosen. What else holds is said by ``prepare_hippocampus.py --help``.

The data ask for registration and for the citation: O. Bernard et al., Deep learning techniques for automatic MRI
cardiac multi-structures segmentation and diagnosis, IEEE Transactions on Medical Imaging 37(11), 2018.
"""

from __future__ import annotations

from raw_dataset import Recipe, from_protocol

RECIPE = Recipe(
    labels={"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3},
    channel="MRI",
    reference="ACDC, Bernard et al. 2018",
    licence="registration and citation asked, non-commercial",
)


def main(argv: list[str] | None = None) -> None:
    """Check the data, then write the dataset and its one fold."""
    from_protocol(argv, __doc__, "ACDC", "3", RECIPE, patients=True)


if __name__ == "__main__":
    main()
