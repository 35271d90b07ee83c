"""Any device that torch computes on, with nothing but torch."""
