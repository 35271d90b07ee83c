"""Shared loops that fit quantizers to calibration data."""
