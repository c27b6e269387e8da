"""Everything that knows the inside of transformers and its neighbours, and nothing else does."""
