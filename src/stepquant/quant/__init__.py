"""Quantizers in a model: where they sit, which grid each gets, and how they are put in and taken out."""
