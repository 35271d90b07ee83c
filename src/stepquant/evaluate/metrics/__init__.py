"""Metrics of images: of pairs with the same seed, of sets, of single images, and distances to data."""
