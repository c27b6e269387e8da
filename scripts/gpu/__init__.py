"""Checking the package on a GPU, or for one: scripts/check_gpu and scripts/tune_gpu."""
