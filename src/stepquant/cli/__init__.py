"""The command line."""

from stepquant.cli.app import main

__all__ = ["main"]
