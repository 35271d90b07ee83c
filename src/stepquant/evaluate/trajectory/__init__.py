"""What quantization does along the denoising trajectory."""
