"""Speed: of one call, of generating images, of single layers, and of operations inside a call."""
