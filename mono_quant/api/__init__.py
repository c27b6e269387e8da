"""The public verbs as straight-line recipes."""
