"""Folders on the disk: strangers' files read without trust, ours written whole or not at all."""
