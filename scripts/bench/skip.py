"""Why a stack does not run a model."""


class Skip(Exception):
    """This stack does not do this model; the text says why."""
