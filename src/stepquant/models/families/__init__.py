"""Families of models: what is declared of each, and the role of every layer."""
