"""Whatever a user holds becomes one source, or one clear error that says what to do instead."""
