"""Bits for each site: how much it hurts to take them away, and plans within a budget."""
