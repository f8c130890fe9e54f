"""The report of a finished conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from codecllm.converter.source.selection import LeftFile
from codecllm.formats.manifest.manifest import Manifest
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, LosslessTensor


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        out: the container.
        manifest: its manifest.
        manifest_sha256: the value to pin.
        stored_bytes: bytes of shards and manifest.
        seconds: how long it took.
        taken: the files that were taken as the model's weights, in one line.
        left: files and folders of the source that are not in the container, and why.
        warnings: sentences for the user.
    """

    out: Path
    manifest: Manifest
    manifest_sha256: str
    stored_bytes: int
    seconds: float
    taken: str = ""
    left: list[LeftFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes of the source's tensors / bytes of shards and manifest."""
        return self.manifest.source.tensor_bytes / self.stored_bytes

    @property
    def weights(self) -> int:
        """Number of weights, aliases not counted."""
        return sum(
            record.elements
            for record in self.manifest.tensors
            if not isinstance(record, AliasTensor)
        )

    @property
    def bits_per_weight(self) -> float:
        """All stored bits / weights."""
        return 8 * self.stored_bytes / max(1, self.weights)

    @property
    def quantized_bits_per_weight(self) -> float:
        """Stored bits without the data of unquantized tensors / quantized weights.

        0 where there are none.
        """
        unquantized_bytes = quantized_weights = 0
        # Headers, manifest and side tensors stay in the account: they are part of the price of a
        # rate.
        for record in self.manifest.tensors:
            if isinstance(record, Int8Tensor):
                quantized_weights += record.elements
            elif isinstance(record, LosslessTensor):
                unquantized_bytes += sum(plane.stored_bytes for plane in record.planes)
            elif not isinstance(record, AliasTensor):
                unquantized_bytes += record.source_bytes
        if not quantized_weights:
            return 0.0
        return 8 * (self.stored_bytes - unquantized_bytes) / quantized_weights
