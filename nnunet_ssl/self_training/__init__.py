"""Offline self-training: a teacher's best predictions of unlabeled images become labels, in rounds."""
