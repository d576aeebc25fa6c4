"""What a step makes of the loader's patches on their device: strong views, boxes, mixes of two batches."""
