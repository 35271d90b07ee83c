"""Fused forwards for building blocks of diffusers; each file is the twin of one in `models/blocks`."""
