"""Stage 1: the container against its source, quantized and encoded again by the reference.

Every decode back end is compared with the reference too.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError, DecodeError, ModelMismatchError, one_line
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, RawTensor
from codecllm.formats.reference import read_run_bytes
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.verifier.checks.integrity import Progress, in_order, stored_names
from codecllm.verifier.checks.rounding import is_repeatable
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.back_ends import BackEnd
from codecllm.verifier.diagnosis.codes.code_autopsy import Explanation, explain, scale_fault
from codecllm.verifier.diagnosis.codes.rows import head_size
from codecllm.verifier.diagnosis.examination import Examination, examine
from codecllm.verifier.diagnosis.parts import place_of
from codecllm.verifier.report import Stage

MAX_AUTOPSIES = 12
"""Tensors whose difference is explained one by one.

With more of them, one explanation is common to all.
"""

_FOREIGN = (Cause.OTHER_REVISION, Cause.CORRUPTED_PAYLOAD)
"""Causes that fit the difference between two trainings.

Scales and codes differ, or for small steps codes alone.
"""

# A kernel that loses its place is off by a vector, a lane or a block: at most 256 elements.
_SHIFTS = range(-256, 257)
_SAMPLE = 1024


def examine_all(
    container: Container, source: SourceModel, workers: int, progress: Progress | None
) -> dict[str, Examination]:
    """Examines every tensor that container and source share; see `examination.examine`."""
    names = [name for name in container.records if name in source.tensors]
    total = sum(source.tensors[name].entry.bytes for name in names)
    bytes_done = 0
    examinations: dict[str, Examination] = {}
    with ThreadPoolExecutor(workers) as pool:
        for name, result in in_order(
            pool, names, lambda name: examine(container, name, source.tensors[name])
        ):
            examinations[name] = result
            bytes_done += source.tensors[name].entry.bytes
            if progress is not None:
                progress(name, bytes_done, total)
    return examinations


def check_round_trip(
    container: Container,
    source: SourceModel,
    source_commit: str | None,
    examined: dict[str, Examination],
    back_ends: Sequence[BackEnd],
    stage: Stage,
    workers: int,
) -> None:
    """Judges the examinations, and compares every decode back end with the reference.

    Args:
        container: the container.
        source: the model that it is said to come from.
        source_commit: the Hub commit of `source`, or None.
        examined: by tensor, see `examine_all`.
        back_ends: those to compare.
        stage: receives findings and figures.
        workers: threads.
    """
    _check_names(container, source, stage)
    for result in examined.values():
        for fault in result.faults:
            _fail_damaged(stage, result, fault)
    _judge(container, source, source_commit, examined, stage)
    # After the judgement: findings about the container stand before those about this machine.
    back_end_facts = _compare_back_ends(container, back_ends, stage, workers)
    chunks = sum(one.chunks for one in examined.values())
    same = sum(one.same_bytes for one in examined.values())
    stage.facts = {
        "tensors": len(examined),
        "chunks": chunks,
        "chunks_encoded_to_the_same_bytes": same,
        "back_ends": back_end_facts,
        "versions": versions(),
        "written_by": container.manifest.writer,
    }
    right = [
        isinstance(one.record, Int8Tensor)
        for one in examined.values()
        if not one.faults and not one.differs
    ]
    int8_count = sum(isinstance(one.record, Int8Tensor) for one in examined.values())
    wrong = {
        finding.error.message.split("'")[1]
        for finding in stage.findings
        if finding.error.message.startswith("back end")
    }
    refined_count = sum(not is_repeatable(one.record) for one in examined.values())
    remark = ""
    if refined_count:
        remark = f" ({refined_count} rounded otherwise: each code is within the recorded error)"
    equal = ", ".join(one.name for one in back_ends if one.name not in wrong) or "none"
    stage.summary = (
        f"{sum(right)} of {int8_count} int8 tensors have the codes of the source{remark}, "
        f"{len(right) - sum(right)} of {len(examined) - int8_count} others are the source's bit "
        f"for bit; {chunks:,} chunks encoded and decoded again ({same:,} to the stored bytes); "
        f"equal to the reference: {equal}"
    )


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that decode and run."""
    import torch
    import transformers
    import xxhash
    import zstandard

    from codecllm.formats import WRITER_VERSION

    return {
        "codecllm": WRITER_VERSION,
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "xxhash": xxhash.VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _check_names(container: Container, source: SourceModel, stage: Stage) -> None:
    for name in sorted(source.tensors.keys() ^ container.records.keys()):
        where = "the source lacks" if name in container.records else "the container lacks"
        stage.fail(ModelMismatchError(f"{where} this tensor", tensor=name), cause=Cause.OTHER_MODEL)


def _fail_damaged(stage: Stage, result: Examination, fault: CodecLLMError) -> None:
    if isinstance(fault, ModelMismatchError):
        stage.fail(fault, cause=Cause.OTHER_MODEL)
        return
    explanation = scale_fault(result) if isinstance(fault, DecodeError) else None
    if explanation is None:
        stage.fail(fault, cause=Cause.DAMAGED)
    else:
        error = DecodeError(explanation.text, tensor=result.name, file=fault.file)
        stage.fail(error, cause=explanation.cause, channel=explanation.channel)


def _judge(
    container: Container,
    source: SourceModel,
    commit: str | None,
    examined: dict[str, Examination],
    stage: Stage,
) -> None:
    """Adds a finding for every tensor that holds something else than the source gives."""
    comparable = [one for one in examined.values() if not one.faults and not one.not_finite]
    differing = [one for one in comparable if one.differs]
    if not differing:
        return
    head = head_size(source.config or {})
    explanations: list[tuple[Examination, Explanation]] = []
    for one in differing[:MAX_AUTOPSIES]:
        explanations.append((one, _explain(container, source, one, head)))
    source_commit = container.manifest.source.commit
    other_commit = source_commit is not None and commit is not None and source_commit != commit
    # Most of the tensors must differ as trainings do: single ones are damage.
    foreign = sum(explanation.cause in _FOREIGN for _, explanation in explanations)
    most = 2 * foreign > len(explanations) and 2 * len(differing) > len(comparable)
    # The revision explains all differences at once and is named first.
    if other_commit or most:
        commits = ""
        if other_commit:
            commits = f"; converted from commit {source_commit}, compared with {commit}"
        text = (
            f"{len(differing)} of {len(comparable)} tensors are not those of this source{commits}; "
            f"the first: {explanations[0][1].text}"
        )
        agrees = _agrees_with_itself(container, differing[0].name)
        verb = "agrees" if agrees else "does not even agree"
        error = DecodeError(
            f"{text}; the container {verb} with its own digest there", tensor=differing[0].name
        )
        stage.fail(error, cause=Cause.OTHER_REVISION, channel=explanations[0][1].channel)
    for one, explanation in explanations:
        cause = explanation.cause
        if most:
            cause = Cause.OTHER_REVISION
        stage.fail(_located(container, one, explanation), cause=cause, channel=explanation.channel)
    # An autopsy reads tensor and source again; the others are listed with their counts.
    for one in differing[MAX_AUTOPSIES:]:
        scales = f"{len(one.wrong_scales)} scales"
        text = f"{one.differing} of {one.elements} symbols and {scales} differ from the source"
        stage.fail(DecodeError(text, tensor=one.name))


def _explain(
    container: Container, source: SourceModel, one: Examination, head: int | None
) -> Explanation:
    tensor = container.tensor(one.name)
    if isinstance(tensor, StoredTensor) and isinstance(tensor.record, Int8Tensor):
        return explain(tensor, source.tensors[one.name], one, head)
    assert one.first is not None
    share = one.differing / max(1, one.elements)
    row, col = one.first
    where = f"element {col}" if isinstance(one.record, RawTensor) else f"row {row}, column {col}"
    unit = "bytes" if isinstance(one.record, RawTensor) else "elements"
    text = (
        f"{one.differing} {unit} of {one.elements} elements differ from the source, "
        f"first at {where}"
    )
    foreign = share > 0.5 or (isinstance(one.record, RawTensor) and share > 0.1)
    return Explanation(Cause.OTHER_REVISION if foreign else Cause.CORRUPTED_PAYLOAD, text, row)


def _located(container: Container, one: Examination, explanation: Explanation) -> DecodeError:
    """Returns the error with file, tensor, and, where single symbols differ, chunk and byte."""
    tensor = container.tensor(one.name)
    error = DecodeError(explanation.text, tensor=one.name, file=tensor.file.name)
    if one.first is not None and isinstance(tensor, StoredTensor):
        chunk, byte = place_of(tensor, *one.first)
        return error.located(chunk=chunk, byte=byte)
    return error


def _agrees_with_itself(container: Container, name: str) -> bool:
    """Whether a tensor's decoded content has the digest that the manifest records."""
    from codecllm.verifier.checks.decoding import scan_tensor

    record = container.records[name]
    return not scan_tensor(
        container, record.alias_of if isinstance(record, AliasTensor) else name
    ).faults


def _compare_back_ends(
    container: Container, back_ends: Sequence[BackEnd], stage: Stage, workers: int
) -> list[dict[str, Any]]:
    """Compares every tile of every coded tensor under every back end with the reference.

    Returns:
        Name, version and number of equal tiles of each back end, as JSON values.
    """
    counts = dict.fromkeys((one.name for one in back_ends), 0)
    names = [
        name
        for name in stored_names(container)
        if not isinstance(container.records[name], RawTensor)
    ]

    def compare(name: str) -> list[tuple[str, int, DecodeError | None]]:
        try:
            tensor = container.tensor(name)
        except CodecLLMError:
            return []  # named already
        assert isinstance(tensor, StoredTensor)
        return [
            (one.name, *_compare_back_end(tensor, one)) for one in back_ends if one.takes(tensor)
        ]

    with ThreadPoolExecutor(workers) as pool:
        for name, results in in_order(pool, names, compare):
            for back_end, tiles, error in results:
                counts[back_end] += tiles
                if error is not None:
                    cause = Cause.SHIFTED if "elements away" in error.message else Cause.BACK_END
                    stage.fail(error.located(tensor=name), cause=cause)
    return [
        {"name": one.name, "version": one.version, "tiles": counts[one.name]} for one in back_ends
    ]


def _compare_back_end(tensor: StoredTensor, back_end: BackEnd) -> tuple[int, DecodeError | None]:
    """Compares the tiles of a tensor up to the first that differs.

    Returns:
        The number of equal tiles, and the error that describes the other one.
    """
    size = word_dtype(DTYPES[tensor.record.dtype])
    for index in range(0, len(tensor.table.grid), tensor.tiles_together):
        try:
            expected = np.frombuffer(
                read_run_bytes(tensor, range(index, index + tensor.tiles_together)), size
            )
        except CodecLLMError:
            return index, None  # damaged, and named already
        chunk = index * tensor.table.planes
        place: dict[str, Any] = {
            "file": tensor.file.name,
            "tensor": tensor.record.name,
            "chunk": chunk,
        }
        place["byte"] = tensor.offset + int(tensor.table.offsets[chunk])
        try:
            words = back_end.decode(tensor, index)
        except Exception as exc:  # a library behind a back end raises what it likes
            reason = one_line(exc)
            return index, DecodeError(
                f"back end {back_end.name!r} failed ({type(exc).__name__}: {reason})", **place
            )
        if words.shape == expected.shape and np.array_equal(words, expected):
            continue
        return index, DecodeError(
            f"back end {back_end.name!r} ({back_end.version}) {_difference(words, expected)}",
            **place,
        )
    return len(tensor.table.grid), None


def _difference(found: Any, expected: Any) -> str:
    if found.shape != expected.shape:
        return f"gives {found.size} elements for {expected.size}"
    bad = found != expected
    shift = shift_of(found, expected)
    if shift is not None:
        return (
            f"returns a shifted buffer: its elements are those that stand {shift:+d} elements away"
        )
    first = int(bad.argmax())
    share = f"{int(bad.sum())} of {found.size} elements"
    return f"differs from the reference in {share}, first element {first} of the tile"


def shift_of(found: Any, expected: Any) -> int | None:
    """Returns the offset of a shifted buffer; None without one.

    It is the k, 0 < |k| <= 256, with found[i] == expected[i + k] for every i that has such a
    partner. Both are flat arrays of bits of one size. A constant array is no shifted one.
    """
    size = len(found)
    # A constant buffer looks the same at every offset.
    if size < 4 or (expected == expected[0]).all():
        return None
    for shift in sorted(_SHIFTS, key=abs):
        if shift == 0 or abs(shift) > size // 2:
            continue
        a = found[: size - shift] if shift > 0 else found[-shift:]
        b = expected[shift:] if shift > 0 else expected[: size + shift]
        # The sample rejects nearly all of 512 offsets without a pass over the whole tile.
        if np.array_equal(a[:_SAMPLE], b[:_SAMPLE]) and np.array_equal(a, b):
            return shift
    return None
