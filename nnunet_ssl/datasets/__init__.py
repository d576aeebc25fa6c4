"""Datasets as their owners publish them, made into nnU-Net raw datasets with few labels: ``nnUNetv2_ssl_dataset``.

Each dataset has its own module, which says where its files are (``Files``), which cases have which part (``Lists``),
what the labels mean and what is done to a case (``Recipe``). ``writing.prepare`` does the rest, the same for all:

1. every file that is needed is read and checked, and all problems are listed at once;
2. the dataset is written under a hidden name and gets its own when it is complete.

Labels of unlabeled cases are not opened, with one exception that a user has to ask for: crops around them.
"""

PUBLISHED = ("acdc", "amos", "brats2019", "hippocampus", "la", "pancreas_ct", "synapse")  # a module each
ORDERED = ("acdc", "hippocampus", "la")  # those with --seed: an order of the training cases for each
MADE_UP = ("demo",)
