"""The rooms of `scripts/sweep`: every model class of the installed transformers goes the whole way, tiny and random."""
