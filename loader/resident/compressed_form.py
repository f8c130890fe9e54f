"""resident="compressed": weights stay as they are stored.

Payloads stay coded in memory and are decoded, checked, into shared scratch just before their use.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.host.decode import Workspace, read_tiles, tiles_per_job, write_tile
from codecllm.loader.host.memory import empty_bytes, empty_tensor
from codecllm.loader.host.workers import Job, WorkerThreads
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.torch_tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    words_of,
)

SCRATCH_ELEMENTS = 1 << 25
"""Most elements of a weight that are decoded at once.

A larger one (a vocabulary) is multiplied in bands of rows.
"""


_decoders: weakref.WeakSet[SharedDecoder] = weakref.WeakSet()


class InMemoryFile:
    """A payload in memory that is read by offset like the shard it came from.

    Attributes:
        name: name of the shard.
        payload: uint8 [bytes], on the CPU.
    """

    def __init__(self, name: str, payload: torch.Tensor) -> None:
        """Keeps the payload, not a copy of it."""
        self.name = name
        self.payload = payload

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` from `offset`."""
        target[:] = memoryview(self.payload.numpy())[offset : offset + len(target)]

    def __reduce__(self) -> Any:
        return InMemoryFile, (self.name, self.payload)


class SharedDecoder:
    """The threads and the scratch that all compressed weights of one model share.

    One weight at a time lies in the scratch: `lock` is held from decoding to the end of its use. A
    copy in another process has threads of its own.
    """

    def __init__(self, workers: int) -> None:
        """Takes `workers` threads; they end when nothing refers to the decoder any more."""
        self.threads = workers
        self.workers = WorkerThreads(workers)
        self.renew()
        _decoders.add(self)

    def __reduce__(self) -> Any:
        return SharedDecoder, (self.threads,)

    def renew(self) -> None:
        """Takes a new lock and no scratch, as a forked process must.

        A thread of the parent that held the lock does not exist in the child, and never frees it.
        """
        self.lock = threading.RLock()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._written_to = False

    def hold(self, source: StoredTensor) -> tuple[CompressedTensor, torch.Tensor]:
        """Returns the tensor and memory for its payload, uint8 [payload bytes], to be filled.

        Use the tensor only once its payload is complete and checked.
        """
        payload = torch.from_numpy(empty_bytes(int(source.table.offsets[-1])))
        file = InMemoryFile(source.file.name, payload)
        return CompressedTensor(replace(source, file=file, offset=0), self), payload

    def decoded(
        self, tensor: CompressedTensor, bands: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns bands of a tensor, decoded in the scratch.

        See `CompressedTensor.decode_bands`. Hold `lock`.

        The next call gives the same memory. Where one does not come to its end, Ctrl-C for example,
        threads may write on: their memory is not used again.
        """
        rows = sum(tensor.height(band) for band in bands)
        size = rows * tensor.cols * dtype.itemsize
        if self._scratch.numel() < size or self._written_to:
            with torch.inference_mode(False):  # a later caller may be outside of it
                self._scratch = empty_tensor((size,), torch.uint8)
        weight = self._scratch[:size].view(dtype).view(rows, tensor.cols)
        self._written_to = True
        tensor.decode_bands(bands, dtype, weight)
        self._written_to = False
        return weight


def _renew_all() -> None:
    for decoder in list(_decoders):
        decoder.renew()


os.register_at_fork(after_in_child=_renew_all)


class CodedMatrix(WeightForm):
    """A matrix that is decoded in blocks of rows when it is used: the bits of dense loading.

    Attributes:
        stored: the tensor.
    """

    kind = "compressed"

    def __init__(self, stored: StoredTensor) -> None:
        """Takes name and shape from the tensor's record."""
        self.stored = stored
        self.name = stored.record.name
        self.shape = torch.Size(stored.record.shape)

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.stored.table.grid.rows

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return self.stored.table.grid.cols

    @property
    @abstractmethod
    def lock(self) -> threading.RLock:
        """Held from decoding to the end of its use."""

    @abstractmethod
    def weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the matrix in blocks of rows, each valid until the next. Hold `lock`."""

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `WeightForm.product`: that of a dense layer, block of rows by block of rows."""
        with self.lock:
            parts = [
                functional.linear(
                    inputs, weight.to(inputs.device), None if bias is None else bias[rows]
                )
                for rows, weight in self.weights(inputs.dtype)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        result = grad.new_zeros(*grad.shape[:-1], self.cols)
        with self.lock:
            for rows, weight in self.weights(grad.dtype):
                result.add_(grad[..., rows] @ weight.to(grad.device))
        return result

    def moved(self, device: torch.device) -> WeightForm:
        """Returns itself: payloads stay where they are decoded, decoded values move."""
        return self

    def checked_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns numbers of rows as int64 on the CPU.

        Raises:
            IndexError: one lies outside of the matrix.
        """
        places = rows.to("cpu", torch.int64)
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < self.rows):
            raise IndexError(f"index out of range: {self.name} has {self.rows} rows")
        return places


class CompressedTensor(CodedMatrix):
    """A matrix whose chunks lie in the host's memory as they are stored.

    Attributes:
        stored: the tensor, reading from memory.
        decoder: decodes it.
    """

    def __init__(self, stored: StoredTensor, decoder: SharedDecoder) -> None:
        """Takes a tensor whose file is an `InMemoryFile`."""
        super().__init__(stored)
        self.decoder = decoder

    def __reduce__(self) -> Any:
        return CompressedTensor, (self.stored, self.decoder)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload and its side data."""
        held = sum(tensor.nbytes for tensor in self.held_tensors().values())
        return held + side_bytes(self.stored)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the payload."""
        assert isinstance(self.stored.file, InMemoryFile)
        return {"payload": self.stored.file.payload}

    @property
    def lock(self) -> threading.RLock:
        """The decoder's: one weight at a time lies in its scratch."""
        return self.decoder.lock

    @property
    def bands(self) -> int:
        """Tiles one above the other."""
        return self.stored.table.grid.down

    def decode_bands(self, bands: list[int], dtype: torch.dtype, out: torch.Tensor) -> None:
        """Decodes bands of tiles one below the other: the same bits as dense loading.

        Args:
            bands: numbers of bands, ascending or not.
            dtype: float dtype of `out`.
            out: [rows of these bands, columns], contiguous, on the CPU.

        Raises:
            FormatError: the payload was damaged in memory.
        """
        grid, jobs, row = self.stored.table.grid, list[Job](), 0
        step = max(1, tiles_per_job(self.stored) // max(1, grid.across))
        for first in range(0, len(bands), step):
            part = bands[first : first + step]
            rows = sum(self.height(band) for band in part)
            jobs.append(partial(self._decode_job, part, dtype, out[row : row + rows]))
            row += rows
        self.decoder.workers.run_all(jobs)

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        out = empty_tensor((self.rows, self.cols), dtype)
        self.decode_bands(list(range(self.bands)), dtype, out)
        return out.to(device)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the matrix in blocks of rows, each in the scratch. Hold `lock`."""
        grid = self.stored.table.grid
        step = max(1, SCRATCH_ELEMENTS // max(1, grid.tile_rows * grid.cols))
        for first in range(0, self.bands, step):
            bands = list(range(first, min(first + step, self.bands)))
            weight = self.decoder.decoded(self, bands, dtype)
            yield slice(first * grid.tile_rows, first * grid.tile_rows + len(weight)), weight

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`; decodes only the tiles that hold the rows."""
        grid = self.stored.table.grid
        places = self.checked_rows(rows)
        out = torch.empty(len(places), self.cols, dtype=dtype)
        bands = torch.div(places, grid.tile_rows, rounding_mode="floor")
        needed = sorted(set(bands.tolist()))
        step = max(1, SCRATCH_ELEMENTS // max(1, grid.tile_rows * grid.cols))
        with self.decoder.lock:
            for first in range(0, len(needed), step):
                part = needed[first : first + step]
                decoded = self.decoder.decoded(self, part, dtype)
                start = 0
                for band in part:
                    here = (bands == band).nonzero().flatten()
                    out[here] = decoded[start + places[here] - band * grid.tile_rows]
                    start += self.height(band)
        return out.to(device)

    def height(self, band: int) -> int:
        """Rows of a band."""
        grid = self.stored.table.grid
        return min(grid.tile_rows, grid.rows - band * grid.tile_rows)

    @torch.inference_mode()  # for `out` may be a tensor of inference mode, which is a thread's own
    def _decode_job(
        self, bands: list[int], dtype: torch.dtype, out: torch.Tensor, workspace: Workspace
    ) -> None:
        across, record, row = self.stored.table.grid.across, self.stored.record, 0
        native = DTYPE_NAMES[dtype] if isinstance(record, Int8Tensor) else record.dtype
        words = (
            words_of(out, *out.shape)
            if TORCH_DTYPES[native] == dtype and native in ("BF16", "F16", "F32")
            else None
        )
        if isinstance(record, Int8Tensor) and words is None:
            native = "F32"
        for run in _consecutive(bands):
            tiles = range(run.start * across, run.stop * across)
            origin = row - run.start * self.stored.table.grid.tile_rows
            for tile, planes in read_tiles(self.stored, tiles, workspace):
                rows = slice(origin + tile.row, origin + tile.row + tile.rows)
                columns = slice(tile.col, tile.col + tile.cols)
                if words is not None:
                    write_tile(self.stored, tile, planes, words[rows, columns], native, workspace)
                else:
                    own = empty_tensor((tile.rows, tile.cols), TORCH_DTYPES[native])
                    view = words_of(own, tile.rows, tile.cols).view(word_dtype(DTYPES[native]))
                    write_tile(self.stored, tile, planes, view, native, workspace)
                    out[rows, columns].copy_(own)
            row += sum(self.height(band) for band in run)


def _consecutive(bands: list[int]) -> Iterator[range]:
    """Cuts a list of bands into runs of consecutive ones, each of which lies in one piece."""
    start = 0
    for end in range(1, len(bands) + 1):
        if end == len(bands) or bands[end] != bands[end - 1] + 1:
            yield range(bands[start], bands[end - 1] + 1)
            start = end


def side_bytes(stored: StoredTensor) -> int:
    """Returns the bytes of a tensor's chunk table, scales, columns and frequency tables."""
    table, tables, columns = stored.table, stored.tables, stored.columns
    arrays = [table.records, table.offsets, table.raw_bytes, stored.scales]
    if columns is not None:
        arrays += [columns.scales, columns.order, columns.places]
    size = 0 if tables is None else len(tables.data) + tables.offsets.nbytes
    return size + sum(array.nbytes for array in arrays if array is not None)
