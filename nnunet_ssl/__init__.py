"""Semi-supervised learning for nnU-Net v2.

Importing this package imports nothing else: it runs at the start of every Python interpreter of the environment
(see ``nnunet_ssl._startup``). The trainers live in ``nnunet_ssl.trainers``, the losses in ``nnunet_ssl.losses``.
"""

__version__ = "0.1.0"
