"""Networks that look at images, and their weights."""
