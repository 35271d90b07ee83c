"""Calibration data along the denoising trajectory: which steps, recorded how, kept where."""
