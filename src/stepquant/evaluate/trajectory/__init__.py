"""Errors along the denoising trajectory: of predictions, of blocks, of layer inputs, and of time embeddings."""
