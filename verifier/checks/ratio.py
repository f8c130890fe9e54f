"""The ratio and the bits per weight, with the entropy bound that explains them."""

from __future__ import annotations

from codecllm.formats.container import Container
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, RawTensor
from codecllm.formats.shards.side_tensors import scale_bytes
from codecllm.verifier.checks.decoding import Scan
from codecllm.verifier.report import Stage


def report_ratio(container: Container, stage: Stage, scans: dict[str, Scan]) -> None:
    """States ratio, bits per weight and entropy bound, recomputed from the decoded tensors.

    The bound is the size that a perfect coder of single symbols would need: the order-0 entropy of
    the symbols of every chunk, the scales as they are, and plainly stored tensors. It is estimated
    from a sample of each chunk (`formats.codecs.entropy`).
    """
    manifest = container.manifest
    weights = sum(
        record.elements for record in manifest.tensors if not isinstance(record, AliasTensor)
    )
    source, stored_bytes = manifest.source.tensor_bytes, container.stored_bytes
    bound_bits = 0.0
    for name, scan in scans.items():
        record = container.records[name]
        if isinstance(record, RawTensor):
            bound_bits += 8 * record.source_bytes
        else:
            bound_bits += sum(scan.entropy_bits)
            bound_bits += 8 * scale_bytes(record) if isinstance(record, Int8Tensor) else 0
    # An alias costs nothing, yet its weights count: the rate is that of the whole model.
    all_weights = sum(record.elements for record in manifest.tensors)
    facts = {
        "source_bytes": source,
        "stored_bytes": stored_bytes,
        "ratio": source / max(1, stored_bytes),
        "weights": all_weights,
        "stored_weights": weights,
        "bits_per_weight": 8 * stored_bytes / max(1, all_weights),
        "entropy_bound_bits_per_weight": bound_bits / max(1, all_weights),
        "efficiency": bound_bits / max(1, 8 * stored_bytes),
    }
    stage.facts = facts
    stage.summary = (
        f"{facts['ratio']:.4f}x of {_dtypes(container)} ({source:,} -> {stored_bytes:,} bytes); "
        f"{facts['bits_per_weight']:.3f} bits per weight, all counted; "
        f"entropy bound {facts['entropy_bound_bits_per_weight']:.3f} "
        f"({facts['efficiency']:.1%} of what is stored)"
    )


def _dtypes(container: Container) -> str:
    totals: dict[str, int] = {}
    for record in container.manifest.tensors:
        totals[record.dtype] = totals.get(record.dtype, 0) + record.source_bytes
    # A few norms in float32 must not hide that the ratio is one of bfloat16.
    main = max(totals, key=lambda dtype: totals[dtype], default="nothing")
    return main if totals.get(main, 0) >= 0.99 * sum(totals.values()) else f"mostly {main}"
