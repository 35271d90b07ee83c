"""Numbers about images: of pairs, of sets, and against data."""
