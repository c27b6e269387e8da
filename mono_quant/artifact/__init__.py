"""The saved folder: its layouts and card, writing, reading, checking and publishing it."""
