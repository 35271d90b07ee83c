"""Layers and attention products that hold packed integers and multiply with them."""
