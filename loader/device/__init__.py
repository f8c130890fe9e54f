"""Weights to a GPU: what crosses the bus are the bytes of the files, and they are decoded where they are used.

    plan      the tensors asked for, in the order of the files, cut into pieces; pieces gathered into batches
    read      threads read each piece of a batch into a pinned buffer of a fixed ring and compare its checksums
    (copy)    one asynchronous copy per batch, on a stream of its own
    chunks    batched decoding of the chunks on a second stream: `rans` by our kernel, zstd by nvCOMP, raw ones moved
    finish    planes become the elements of the final tensor
    pipeline  the thread that drives this, with events for back-pressure; faults are read back once per batch
    feed      what the loader asks: tensors decoded ahead, handed out when they are wanted
    codecs    which decoders this machine has, and why not

`streams` holds everything that a device's streams, events and pinned memory are.
"""
