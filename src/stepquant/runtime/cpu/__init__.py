"""The processor: its integer products, recorded calls, and the layers that it computes faster in float."""
