"""SASNet: its trainer, memory of confidence, coordinates of patches, and views of the two branches."""
