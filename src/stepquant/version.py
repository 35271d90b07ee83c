"""The version of the package, and the torch that its kernels are compiled against, where everything may read them."""

__version__ = "0.1.0"
TORCH = "2.13.0"
