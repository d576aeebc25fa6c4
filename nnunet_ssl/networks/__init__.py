"""Modules that only training needs. The network that predicts is always nnU-Net's own, built from the plans."""
