"""A model in memory, changed and measured."""
