"""Schemes: how a tensor becomes planes of byte symbols and back.

These are slow, obvious references; every fast path gives the same bits.

| scheme   | planes                                                                    |
|----------|---------------------------------------------------------------------------|
| raw      | none: the tensor stands in the shard under its own name, dtype and shape   |
| lossless | the bytes of each element, most significant first, sign bit moved last     |
| int8     | one: the codes; beside it one float32 scale per output channel             |
"""

SCHEMES = ("raw", "lossless", "int8")
