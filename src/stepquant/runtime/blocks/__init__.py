"""Blocks run as one: the twins of those in `models/blocks`, a file each."""
