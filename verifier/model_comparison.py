"""`compare`: two containers or plain models, tensor by tensor, then by logits, then by text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.source import SourceModel
from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError, UsageError, one_line
from codecllm.formats.machine import available_memory, threads_of
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.int8 import dequantize
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import PlainTensor, tile_steps
from codecllm.hub import resolve
from codecllm.verifier.baseline.baseline import MEMORY_FACTOR
from codecllm.verifier.checks.integrity import Progress, in_order
from codecllm.verifier.compared_files import different_files, files_of_container, files_of_source

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Described:
    """Dtype, shape and scheme of a tensor on one side; `source` is the scheme of a plain model."""

    dtype: str
    shape: tuple[int, ...]
    scheme: str


class Side:
    """One of the two models: reads its tensors block by block, as bits of their source dtype.

    Attributes:
        name: as it was given.
        folder: where its files are.
        tensors: its tensors, by name.
        files: its side files, by name.
    """

    def __init__(self, name: str | Path) -> None:
        """Opens a container or a plain model.

        Raises:
            CodecLLMError: it is neither, or cannot be read.
        """
        self.folder, self.name = resolve(name, kind="either").folder, str(name)
        self._container: Container | None = None
        self._source: SourceModel | None = None
        if (self.folder / MANIFEST_NAME).exists():
            self._container = Container(self.folder)
            records = self._container.records.values()
            self.tensors = {
                one.name: Described(one.dtype, tuple(one.shape), one.scheme) for one in records
            }
            self.stored_bytes = self._container.stored_bytes
            self.files = files_of_container(self._container)
        else:
            self._source = SourceModel(self.folder, with_code=True)
            source_tensors = self._source.tensors.values()
            self.tensors = {
                one.name: Described(one.dtype.name, one.shape, "source") for one in source_tensors
            }
            self.stored_bytes = self._source.tensor_bytes
            self.files = files_of_source(self._source)

    @property
    def is_container(self) -> bool:
        """Whether it is a container."""
        return self._container is not None

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """Yields a tensor's elements, row-major, as flat arrays of unsigned words.

        The words are bytes for types below a byte. An int8 tensor is dequantized: fl32(code *
        scale), rounded once to its dtype.

        Raises:
            FormatError: the tensor is damaged.
        """
        if self._source is not None:
            entry = self._source.tensors[name].entry
            # Blocks bound the memory: a tensor may be larger than the machine.
            for first in range(0, entry.bytes, 8 * _BLOCK_ELEMENTS):
                last = min(first + 8 * _BLOCK_ELEMENTS, entry.bytes)
                data = self._source.tensors[name].read_bytes(first, last)
                yield np.frombuffer(data, _words(entry.dtype.name))
            return
        assert self._container is not None
        yield from _decoded_blocks(self._container, name)

    def load(self) -> Any:
        """Returns the model, ready to run, on the CPU."""
        from codecllm.loader import from_pretrained
        from codecllm.loader.hf.plain import load_plain
        from codecllm.loader.hf.quiet import without_progress_bars

        with without_progress_bars():
            return (
                from_pretrained(self.folder, resident="dense")
                if self.is_container
                else load_plain(self.folder).eval()
            )

    def close(self) -> None:
        """Closes the files."""
        for model in (self._container, self._source):
            if model is not None:
                model.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def compare_models(
    a: str | Path,
    b: str | Path,
    *,
    run: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares two containers or plain models.

    Args:
        a: folder or Hub id; errors and divergences are relative to it.
        b: folder or Hub id.
        run: also run both on fixed prompts, where they fit in memory.
        workers: threads; None takes one per core.
        progress: called with a tensor's name, bytes done and bytes in all.

    Returns:
        JSON values: `same` (every tensor has the same bits, and the files that transformers reads
        say the same), `tensors` (per name: `same`, `relative_error`, `worst_error`, `differing`,
        schemes), `only_in_a`, `only_in_b`, `files` (names of those that differ; see
        `different_files`), `stored_bytes`, and with `run` `outputs` (see `text.compare_text`) or
        `not_run`, the reason why not.

    Raises:
        CodecLLMError: one of them is neither a container nor a model, or is damaged.
    """
    check_arguments(run=run, workers=workers, progress=progress)
    with ExitStack() as stack:
        side_a, side_b = stack.enter_context(Side(a)), stack.enter_context(Side(b))
        common = [name for name in side_a.tensors if name in side_b.tensors]
        if not common:
            raise UsageError("the two models share no tensor", got=f"{a}, {b}")
        rows, elements_done = [], 0
        total = sum(math.prod(side_a.tensors[name].shape) for name in common)
        with ThreadPoolExecutor(threads_of(workers)) as pool:
            for name, row in in_order(
                pool, common, lambda name: compare_tensors(side_a, side_b, name)
            ):
                rows.append(row)
                elements_done += math.prod(side_a.tensors[name].shape)
                if progress is not None:
                    progress(name, elements_done, total)
        only_a = [name for name in side_a.tensors if name not in side_b.tensors]
        only_b = [name for name in side_b.tensors if name not in side_a.tensors]
        files = different_files(side_a.files, side_b.files)
        same_tensors = not only_a and not only_b and all(row["same"] for row in rows)
        comparison: dict[str, Any] = {
            "a": side_a.name,
            "b": side_b.name,
            "same": same_tensors and not files,
            "only_in_a": only_a,
            "only_in_b": only_b,
            "stored_bytes": [side_a.stored_bytes, side_b.stored_bytes],
            "files": files,
            "tensors": rows,
        }
        if run:
            comparison |= _run(side_a, side_b, same_tensors)
    return comparison


def compare_tensors(a: Side, b: Side, name: str) -> dict[str, Any]:
    """Compares two tensors of one name.

    Returns:
        JSON values: names of dtypes and schemes, the number of elements whose bits differ, and
        errors relative to the root mean square of `a`'s tensor.
    """
    tensor_a, tensor_b = a.tensors[name], b.tensors[name]
    row: dict[str, Any] = {
        "name": name,
        "shape": list(tensor_a.shape),
        "dtype": tensor_a.dtype,
        "schemes": [tensor_a.scheme, tensor_b.scheme],
    }
    if (tensor_a.dtype, tensor_a.shape) != (tensor_b.dtype, tensor_b.shape):
        other = {"other_dtype": tensor_b.dtype, "other_shape": list(tensor_b.shape)}
        return {
            **row,
            **other,
            "same": False,
            "differing": None,
            "relative_error": None,
            "worst_error": None,
        }
    differing, energy, error, worst = 0, 0.0, 0.0, 0.0
    for x, y in aligned(a.blocks(name), b.blocks(name)):
        bad = x != y
        differing += int(np.count_nonzero(bad))
        values = _values(x, tensor_a.dtype)
        # Infinity and NaN would make the energy, and with it every relative error, meaningless.
        if values is not None:
            finite = np.where(np.isfinite(values), values, 0.0)
            energy += float(np.square(finite).sum())
        if bad.any() and values is not None:
            others = _values(y, tensor_a.dtype)
            assert others is not None
            with np.errstate(invalid="ignore"):
                gap = np.abs(values[bad] - others[bad])
            # The bits differ, so a NaN on one side is a difference without bound.
            gap = np.where(np.isnan(gap), np.inf, gap)
            error, worst = error + float(np.square(gap).sum()), max(worst, float(gap.max()))
    has_values = _values(np.empty(0, _words(tensor_a.dtype)), tensor_a.dtype) is not None
    relative = (
        math.sqrt(error / energy)
        if energy and math.isfinite(error)
        else (0.0 if not error else None)
    )
    return {
        **row,
        "same": differing == 0,
        "differing": differing,
        "relative_error": relative if has_values else None,
        "worst_error": (worst if math.isfinite(worst) else None) if has_values else None,
    }


def aligned(
    a: Iterator[NDArray[Any]], b: Iterator[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Cuts two streams of flat arrays, equally long in all, into pairs of equal length."""
    rest_a = rest_b = np.empty(0)
    # The sides cut their blocks differently: a plain model by bytes, a container by tiles.
    while True:
        if not rest_a.size:
            rest_a = next(a, rest_a[:0])
        if not rest_b.size:
            rest_b = next(b, rest_b[:0])
        size = min(rest_a.size, rest_b.size)
        if size == 0:
            assert rest_a.size == rest_b.size == 0, "streams of different lengths"
            return
        yield rest_a[:size], rest_b[:size]
        rest_a, rest_b = rest_a[size:], rest_b[size:]


def _decoded_blocks(container: Container, name: str) -> Iterator[NDArray[Any]]:
    from codecllm.verifier.checks.decoding import Scan, blocks_in_source_order

    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor):
        yield np.frombuffer(tensor.read(), _words(tensor.record.dtype))
        return
    scan = Scan(entropy_bits=[0.0] * tensor.table.planes)
    for tile, elements in blocks_in_source_order(tensor, scan):
        if isinstance(tensor.record, Int8Tensor):
            values = dequantize(
                elements.view(np.int16 if tensor.record.wide else np.int8), tile_steps(tensor, tile)
            )
            yield bits_from_float32(values, tensor.record.dtype).reshape(-1)
        else:
            yield np.array(elements).reshape(-1)
    if scan.faults:
        raise scan.faults[0]


def _words(dtype: str) -> np.dtype[Any]:
    bits = DTYPES[dtype].bits
    return word_dtype(DTYPES[dtype]) if bits in (8, 16, 32, 64) else np.dtype(np.uint8)


def _values(words: NDArray[Any], dtype: str) -> NDArray[np.float64] | None:
    """Returns the values of floats and integers as float64, None for all other types."""
    if dtype in ("BF16", "F16", "F32"):
        return float32_from_bits(words, dtype).astype(np.float64)
    if dtype == "F64":
        return words.view(np.float64)
    if dtype in ("I8", "I16", "I32", "I64"):
        return words.view(f"<i{words.itemsize}").astype(np.float64)
    return words.astype(np.float64) if dtype in ("U8", "U16", "U32", "U64", "BOOL") else None


def _run(left: Side, right: Side, same: bool) -> dict[str, Any]:
    """Runs both models on the fixed prompts; the source of divergences is `left`."""
    needed_bytes = int(2 * MEMORY_FACTOR * sum(_tensor_bytes(side) for side in (left, right)) / 2)
    if needed_bytes > available_memory():
        free = available_memory()
        return {
            "not_run": (
                f"two models need {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
        }
    from codecllm.verifier.baseline import model_output as output
    from codecllm.verifier.diagnosis.model import text
    from codecllm.verifier.diagnosis.model.tokenizers import check_tokenizers
    from codecllm.verifier.report import Stage

    try:
        first, second = left.load(), right.load()
        coders = (
            output.PromptCoder(left.folder, first.config),
            output.PromptCoder(right.folder, second.config),
        )
        script = text.make_inputs(coders[0], None, None)
        base = text.evaluate_outputs(first, script)
        other = text.evaluate_outputs(second, script, base)
    except CodecLLMError:
        # Damage is the caller's to see. Only a model that cannot run on text is a remark.
        raise
    except Exception as exc:  # a model class may refuse plain text with any type
        return {"not_run": f"{type(exc).__name__}: {one_line(exc)}"}
    stage = Stage("outputs")
    check_tokenizers(*coders, (left.folder, right.folder), stage)
    text.compare_text(script, base, other, coders, same, stage)
    faults = [str(finding.error) for finding in stage.findings]
    return {"outputs": {**stage.facts, "summary": stage.summary, "findings": faults}}


def _tensor_bytes(side: Side) -> int:
    return sum(
        math.prod(one.shape) * DTYPES[one.dtype].bits // 8
        for one in side.tensors.values()
        if one.scheme != "alias"
    )
