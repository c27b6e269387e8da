"""Tensors in files: safetensors headers and bytes, shards, a checkpoint as a mapping, guarded pickles."""
