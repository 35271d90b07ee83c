"""Pipelines: how those of a kind are asked for images."""
