"""Blocks that models are built of, as far as they may run as one: a file each."""
