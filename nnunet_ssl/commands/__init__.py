"""The ``nnUNetv2_ssl_*`` commands: arguments in, one call into the room that does the work.

The ``main`` of each takes the arguments without the program's name; those of ``sys.argv`` when None.
"""
