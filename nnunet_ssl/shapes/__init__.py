"""Labelled cases in the shapes of unlabelled images, by registration."""
