"""Other programs that read our folders: the tiny models they get, and what runs them there."""
