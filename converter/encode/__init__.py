"""A block of a tensor -> encoded chunks."""
