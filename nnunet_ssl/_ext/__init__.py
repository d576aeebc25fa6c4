"""The folder that nnU-Net searches for trainers. Keep it at one module: nnU-Net imports every module it finds here."""
