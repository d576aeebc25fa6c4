"""nnU-Net's augmentation on the device: the workers draw and crop, the device computes."""
