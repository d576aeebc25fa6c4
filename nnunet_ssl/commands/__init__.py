"""The ``nnUNetv2_ssl_*`` commands: arguments in, one call into the room that does the work."""
