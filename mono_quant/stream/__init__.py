"""Checkpoint to checkpoint: weights go from files to files, and the model is never in memory."""
