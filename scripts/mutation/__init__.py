"""The rooms of `scripts/mutate.py`."""
