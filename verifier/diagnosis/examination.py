"""Examination of a tensor for stages 1 and 2: two passes over its source, one over its chunks.

Memory is a few copies of one tile per thread, for tensors of any size. The arithmetic is that of
the slow reference in `formats.schemes`; no code of converter or loader that computes a code or a
weight is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.codecs import CODEC_IDS, CODEC_NAMES, CODECS, RANS_ID, rans
from codecllm.formats.codecs.entropy import counted_entropy_bits, prefix_code_bits
from codecllm.formats.codecs.rans_fit import coded_bits, fit_table
from codecllm.formats.codecs.rans_reference import STATE_BYTES
from codecllm.formats.codecs.zstd import SPARSE_LOW_BITS, ZstdCodec
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError, DecodeError, ModelMismatchError
from codecllm.formats.manifest.records import Int8Tensor, LosslessTensor, RawTensor
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.schemes.int8 import channel_scales, dequantize, quantize
from codecllm.formats.schemes.lossless import join_planes, word_dtype
from codecllm.formats.shards.side_reading import widened_scales
from codecllm.formats.shards.side_tensors import SCALE
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor, tile_steps
from codecllm.formats.tiling import Tile, default_grid, last_axis_matrix
from codecllm.verifier.checks.rounding import code_errors, is_repeatable, repeated
from codecllm.verifier.diagnosis.parts import (
    Part,
    asked_steps,
    decoded_parts,
    read_tile,
    read_weights,
)

Place = tuple[int, int]
"""Row and column of the tensor's matrix."""

FP16_LARGEST = 65504.0
FP16_SMALLEST = 2.0**-14
"""Largest and smallest normal float16: a scale outside is lost where it goes through that type."""

_PLAIN_STEP_BYTES = 4 << 20


@dataclass(slots=True)
class Choice:
    """Errors and sizes of a tensor under one choice of scales.

    Attributes:
        squared_error: sum of (w - code * scale)^2.
        worst_error: largest |w - code * scale|.
        histogram: int64 [256]: how often each code occurs; index is code + 128, and 0 for all codes
            beyond 127.
        entropy_bits: order-0 entropy of each chunk's codes, summed, in bits, from all symbols.
        prefix_bits: least bits of a code with whole bits per symbol, per chunk, summed.
        stored_bytes: size of the chunks as the container's codec packs them.
    """

    squared_error: float = 0.0
    worst_error: float = 0.0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    entropy_bits: float = 0.0
    prefix_bits: int = 0
    stored_bytes: int = 0

    @property
    def codes_in_use(self) -> int:
        """Number of distinct codes."""
        return int(np.count_nonzero(self.histogram))

    def add_errors(self, errors: NDArray[np.float32]) -> None:
        """Counts a tile's errors."""
        self.squared_error += float(np.square(errors).sum(dtype=np.float64))
        self.worst_error = max(self.worst_error, float(np.abs(errors).max(initial=0.0)))

    def add_codes(self, codes: NDArray[np.signedinteger]) -> None:
        """Counts codes."""
        places = codes.astype(np.int64) + 128
        self.histogram += np.bincount(
            np.where((places < 0) | (places > 255), 0, places).reshape(-1), minlength=256
        )

    def add_chunk(self, symbols: NDArray[np.uint8], stored_bytes: int) -> None:
        """Counts the symbols of a chunk, flat, and their sizes."""
        counts = np.bincount(symbols, minlength=256)
        self.entropy_bits += counted_entropy_bits(counts)
        self.prefix_bits += prefix_code_bits(counts)
        self.stored_bytes += stored_bytes


@dataclass(slots=True)
class Examination:
    """The results of an examination of one tensor.

    Attributes:
        name: the tensor's.
        record: manifest record of the tensor that holds the bytes (an alias's target).
        elements: number of elements.
        chunks: chunks that were decoded.
        same_bytes: chunks whose symbols, encoded again on this machine, give the stored bytes.
        energy: sum of w^2 of the source's finite weights (int8).
        per_channel: errors and sizes of the stored tensor (lossless: only sizes).
        per_tensor: those of one scale for the whole tensor (int8 with scales from the channels'
            largest weights).
        scales: the scales that the source asks for, float32 [channels]; where steps were chosen,
            the stored ones (int8).
        stored_scales: those that the container holds, as far as they could be read (int8).
        absmax: float32 [channels]: largest magnitudes of the source's channels (int8).
        not_finite: channel (int8) or row (others) -> number of NaN and infinite weights in the
            source.
        differing: elements whose symbols differ from those of the source.
        first: where the first of them is.
        faults: damage that kept symbols from being compared.
    """

    name: str
    record: RawTensor | LosslessTensor | Int8Tensor
    elements: int
    chunks: int = 0
    same_bytes: int = 0
    energy: float = 0.0
    per_channel: Choice = field(default_factory=Choice)
    per_tensor: Choice | None = None
    scales: NDArray[np.float32] | None = None
    stored_scales: NDArray[np.float32] | None = None
    absmax: NDArray[np.float32] | None = None
    not_finite: dict[int, int] = field(default_factory=dict)
    differing: int = 0
    first: Place | None = None
    faults: list[CodecLLMError] = field(default_factory=list)

    @property
    def wrong_scales(self) -> NDArray[np.int64]:
        """Channels whose stored scale is not the one that the source asks for."""
        if self.scales is None or self.stored_scales is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.scales != self.stored_scales)

    @property
    def differs(self) -> bool:
        """Whether the stored tensor differs from that of the source."""
        return self.differing > 0 or len(self.wrong_scales) > 0


def examine(container: Container, name: str, source: SourceTensor) -> Examination:
    """Examines one tensor; damage becomes `faults`."""
    record = container.stored_record(name)
    result = Examination(name, record, record.elements)
    try:
        if (record.dtype, tuple(record.shape)) != (source.dtype.name, source.shape):
            got = f"{source.dtype.name} {list(source.shape)}"
            expected = f"{record.dtype} {record.shape}"
            raise ModelMismatchError(
                "type of the source's tensor is not the container's",
                tensor=name,
                got=got,
                expected=expected,
            )
        if isinstance(record, Int8Tensor):
            _find_scales(container, record, source, result)
        tensor = container.tensor(name)
        if isinstance(tensor, PlainTensor):
            _examine_plain(tensor, source, result)
        elif isinstance(tensor.record, Int8Tensor):
            _examine_int8(tensor, source, result)
        else:
            _examine_lossless(tensor, source, result)
    except CodecLLMError as exc:
        result.faults.append(exc)
    return result


def _find_scales(
    container: Container, record: Int8Tensor, source: SourceTensor, result: Examination
) -> None:
    """Makes the first pass over the source: the largest magnitude of each channel.

    Reads the stored scales too, valid or not.
    """
    # Not by `container.tensor`, which refuses scales that the format forbids: these are a finding.
    file, header = container.shard(record.shard)
    entry = header.tensors[SCALE.name_for(record.name)]
    result.stored_scales = widened_scales(file.read(entry.start, entry.bytes), record)
    by_row = record.channel_kind == "row"
    rows = (
        len(result.stored_scales)
        if by_row
        else record.elements // max(1, len(result.stored_scales))
    )
    # The chunk table may be damaged: its grid is not needed for the source.
    grid = default_grid(rows, record.elements // max(1, rows))
    absmax = np.zeros(len(result.stored_scales), np.float32)
    for tile in grid:
        weights = read_weights(source, grid, tile)
        largest = np.abs(weights).max(axis=1 if by_row else 0)
        channels = (
            slice(tile.row, tile.row + tile.rows)
            if by_row
            else slice(tile.col, tile.col + tile.cols)
        )
        if not np.isfinite(largest).all():
            _count_not_finite(result, weights if by_row else weights.T, channels.start)
            # One NaN would make the scale of its channel NaN, and all codes of the channel differ.
            largest = np.where(np.isfinite(largest), largest, 0)
        absmax[channels] = np.maximum(absmax[channels], largest)
    result.absmax = absmax
    result.scales = channel_scales(absmax) if record.rounding is None else result.stored_scales


def _count_not_finite(result: Examination, channels: NDArray[np.floating], first: int) -> None:
    counts = np.count_nonzero(~np.isfinite(channels), axis=1)
    for channel in np.flatnonzero(counts).tolist():
        result.not_finite[first + channel] = result.not_finite.get(first + channel, 0) + int(
            counts[channel]
        )


def _examine_int8(tensor: StoredTensor, source: SourceTensor, result: Examination) -> None:
    assert (
        isinstance(tensor.record, Int8Tensor)
        and result.scales is not None
        and result.absmax is not None
    )
    record = tensor.record
    whole = channel_scales(result.absmax.max(keepdims=True))
    per_tensor = result.per_tensor = Choice() if record.rounding is None else None
    for part in decoded_parts(tensor, result.faults):
        codes = part.codes
        words = read_tile(source, tensor.table.grid, part.place)
        weights = float32_from_bits(words, record.dtype)
        if result.not_finite:
            # They are reported on their own; here they would hide every other difference.
            weights = np.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
        result.energy += float(np.square(weights, dtype=np.float64).sum())
        # Codes that follow from weights and steps are compared one by one, others by their bound.
        if is_repeatable(record):
            steps = asked_steps(tensor, result.scales, part.place)
            _note_difference(result, part.place, codes != repeated(weights, steps, tensor))
        else:
            errors, bounds = code_errors(tensor, part.place, codes, words)
            _note_difference(result, part.place, ~(errors <= bounds))
        result.per_channel.add_errors(weights - dequantize(codes, tile_steps(tensor, part.place)))
        result.per_channel.add_codes(codes)
        _encode_again(tensor, part, result)
        # One scale per tensor is measured with the same tiles and the same coder.
        if per_tensor is not None:
            together = quantize(weights, whole)
            per_tensor.add_errors(weights - dequantize(together, whole))
            per_tensor.add_codes(together)
            per_tensor.add_chunk(
                together.reshape(-1).view(np.uint8), _packed_bytes(tensor, together)
            )


def _packed_bytes(tensor: StoredTensor, codes: NDArray[np.signedinteger]) -> int:
    """Returns the size of int8 codes under the tensor's codec, or raw if that is smaller."""
    main = tensor.record.planes[0].codec
    symbols = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    # The size of a rans chunk follows from its counts: nothing needs to be encoded.
    if main == rans.NAME:
        counts = np.bincount(symbols, minlength=256)
        return min(codes.size, STATE_BYTES + coded_bits(fit_table(counts), counts) // 8)
    return min(codes.size, len(CODECS[CODEC_IDS["zstd"]].encode(symbols)))


def _there_and_back(
    tensor: StoredTensor, chunk: int, symbols: NDArray[np.uint8]
) -> tuple[bytes, bytes]:
    """Encodes a chunk's symbols with its codec (and frequency table) and decodes them again.

    Returns:
        The encoded and the decoded bytes.
    """
    codec = tensor.table.chunks[chunk].codec
    if codec != RANS_ID:
        # The writer packs sparse planes with other parameters, which the bytes depend on.
        sparse = (
            tensor.table.records["low_bits"][chunk] >= SPARSE_LOW_BITS
            and codec == ZstdCodec.codec_id
        )
        stored_bytes = bytes(
            ZstdCodec().encode_sparse(symbols) if sparse else CODECS[codec].encode(symbols)
        )
        return stored_bytes, bytes(CODECS[codec].decode(stored_bytes, symbols.size))
    assert tensor.tables is not None
    table = tensor.tables.table(*divmod(chunk, tensor.table.planes))
    (stored_bytes,) = rans.encode_chunks([rans.Uncoded(symbols, table)])
    (symbols_again,) = rans.decode_chunks([rans.Coded(stored_bytes, symbols.size, table)])
    if isinstance(symbols_again, DecodeError):
        raise symbols_again.located(tensor=tensor.record.name, chunk=chunk)
    return stored_bytes, symbols_again.tobytes()


def _examine_lossless(tensor: StoredTensor, source: SourceTensor, result: Examination) -> None:
    dtype = DTYPES[tensor.record.dtype]
    for part in decoded_parts(tensor, result.faults):
        tile = part.place
        words = read_tile(source, tensor.table.grid, tile)
        if dtype.name in ("BF16", "F16", "F32", "F64"):
            values = (
                words.view(np.float64)
                if dtype.name == "F64"
                else float32_from_bits(words, dtype.name)
            )
            if not np.isfinite(values).all():
                _count_not_finite(result, values, tile.row)
        elements = join_planes([plane.reshape(-1) for plane in part.planes], dtype).reshape(
            tile.rows, tile.cols
        )
        _note_difference(result, tile, elements != words)
        _encode_again(tensor, part, result)


def _examine_plain(tensor: PlainTensor, source: SourceTensor, result: Examination) -> None:
    size = tensor.record.source_bytes
    record = tensor.record
    for first in range(0, size, _PLAIN_STEP_BYTES):
        count = min(_PLAIN_STEP_BYTES, size - first)
        ours = tensor.file.read(tensor.offset + first, count)
        theirs = source.read_bytes(first, first + count)
        if record.dtype in ("BF16", "F16", "F32", "F64"):
            words = np.frombuffer(theirs, word_dtype(DTYPES[record.dtype]))
            values = (
                words.view(np.float64)
                if record.dtype == "F64"
                else float32_from_bits(words, record.dtype)
            )
            if not np.isfinite(values).all():
                cols = last_axis_matrix(tuple(record.shape))[1] if len(record.shape) > 1 else 1
                for place in np.flatnonzero(~np.isfinite(values)).tolist():
                    row = (first // words.itemsize + place) // cols
                    result.not_finite[row] = result.not_finite.get(row, 0) + 1
        if ours != theirs:
            bad = np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8)
            result.first = result.first or (
                0,
                (first + int(bad.argmax())) // max(1, DTYPES[record.dtype].bits // 8),
            )
            result.differing += int(np.count_nonzero(bad))
    # Plain bytes are stored as they are: their entropy is not looked at.
    result.per_channel.stored_bytes = size
    result.per_channel.entropy_bits = 8.0 * size
    result.per_channel.prefix_bits = 8 * size


def _note_difference(result: Examination, tile: Tile, bad: NDArray[np.bool_]) -> None:
    if bad.any():
        result.differing += int(np.count_nonzero(bad))
        # Parts come in order, so the first difference is the one nearest to the cause.
        if result.first is None:
            row, col = np.unravel_index(int(bad.argmax()), bad.shape)
            result.first = (tile.row + int(row), tile.col + int(col))


def _encode_again(tensor: StoredTensor, part: Part, result: Examination) -> None:
    """Counts the chunks of a part and encodes and decodes them on this machine.

    Raises:
        DecodeError: symbols do not come back.
    """
    for chunk, symbols in enumerate(part.chunks, part.first):
        place = tensor.table.chunks[chunk]
        result.per_channel.add_chunk(symbols, place.stored_bytes)
        # The same codec on this machine: a broken library shows here, and not as a damaged file.
        stored_bytes, symbols_again = _there_and_back(tensor, chunk, symbols)
        if symbols_again != symbols.tobytes():
            name = CODEC_NAMES[place.codec]
            raise DecodeError(
                f"codec {name} does not give back what it encoded",
                tensor=tensor.record.name,
                chunk=chunk,
            )
        slots = tensor.read_slots(chunk, chunk + 1, bytearray(tensor.slots_bytes(chunk, chunk + 1)))
        result.chunks += 1
        result.same_bytes += bytes(stored_bytes) == bytes(slots[: place.stored_bytes])
