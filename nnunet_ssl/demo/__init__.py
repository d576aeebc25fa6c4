"""A made-up dataset, and a small run of the whole package on it: what ``nnUNetv2_ssl_demo`` shows."""
