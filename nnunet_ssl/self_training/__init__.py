"""Offline self-training: a teacher's best predictions of unlabelled images become labels, in rounds."""
