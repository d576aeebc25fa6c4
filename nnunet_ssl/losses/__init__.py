"""Losses: tensors in, tensors out. Nothing here knows of trainers, files or nnU-Net."""
