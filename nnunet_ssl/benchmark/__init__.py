"""From a protocol to a table: what is compared, on which data, with which budget, as a list of nnU-Net's commands."""
