"""Judging predictions: metrics of a case, evaluation of folders, paired comparison of methods."""
