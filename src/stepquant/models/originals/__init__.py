"""Networks in the names of their original repositories, which diffusers renames, cuts and reorders when it loads them.

The way back, tensor by tensor. Programs that came before diffusers know no other names. What is written here is not
trusted: `in_original_names` sends what it made through the converter of diffusers, and has to get back what it was given.
"""

from stepquant.models.originals.published import architecture_of, in_original_names

__all__ = ["architecture_of", "in_original_names"]
