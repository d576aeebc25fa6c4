"""Labeled cases in the shapes of unlabeled images, by registration."""
