"""Files of packed integers that other programs wrote: what they say, and an ordinary folder made of them."""
