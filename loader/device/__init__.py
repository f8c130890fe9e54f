"""Weights to a GPU: the bytes of the files cross the bus and are decoded where they are used.

    plan        tensors cut into pieces that one thread reads, pieces gathered into batches
    read_piece  a thread reads a piece into pinned memory and compares its checksums
    reading     the ring of pinned buffers, and the threads that fill it
    issuing     one copy per batch, then decoding and finish on a second stream
    chunks      batched decoding: `rans` by a kernel of this package, zstd by nvCOMP, raw ones moved
    finish      planes become elements of the final tensor
    engine      the thread that drives this, with events for back-pressure
    engines     the engines of one load, one per device
    placement   on which device a model will lie
    codecs      which decoders this machine has, and why not

`streams` holds the streams, events and pinned memory of a device.
"""
