"""The floating-point world: diffusers models as stepquant sees them."""
