"""Modules whose weight stays entropy-coded in memory and is decoded, checked, into shared scratch just before it is used."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.host.decode import Workspace, read_tiles, tiles_per_job, write_tile
from codecllm.loader.host.memory import empty_bytes, empty_tensor
from codecllm.loader.host.workers import Job, WorkerThreads
from codecllm.loader.torch_tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    words_of,
)

SCRATCH_ELEMENTS = 1 << 25
"""Most elements of a weight that are decoded at once; a larger one (a vocabulary) is multiplied in bands of rows."""


class InMemoryFile:
    """A payload in memory that is read by offset like the shard it came from."""

    def __init__(self, name: str, payload: memoryview) -> None:
        self.name = name
        self._payload = payload

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` from `offset`."""
        target[:] = self._payload[offset : offset + len(target)]


class SharedDecoder:
    """The threads and the scratch that all compressed modules of one model share.

    One weight at a time lies in the scratch: `lock` is held from decoding to the end of its use.
    """

    def __init__(self, workers: int) -> None:
        """Takes `workers` threads; they end when nothing refers to the decoder any more."""
        self.workers = WorkerThreads(workers)
        self.lock = threading.RLock()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._written_to = False

    def hold(self, source: StoredTensor) -> tuple[CompressedTensor, torch.Tensor]:
        """Returns the tensor and memory for its payload, uint8 [payload bytes], to be filled.

        Use the tensor only once its payload is complete and checked.
        """
        payload = torch.from_numpy(empty_bytes(int(source.table.offsets[-1])))
        file = InMemoryFile(source.file.name, memoryview(payload.numpy()))
        return CompressedTensor(replace(source, file=file, offset=0), self), payload

    def decoded(
        self, tensor: CompressedTensor, bands: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns bands of a tensor, decoded in the scratch; see `CompressedTensor.decode_bands`. Hold `lock`.

        The next call gives the same memory. Where one does not come to its end, Ctrl-C for example, threads may write on: what
        they write to is not used again.
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


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrix(ABC):
    """A matrix that is decoded when it is used.

    Attributes:
        stored: the tensor.
    """

    stored: StoredTensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns itself: it never changes."""
        return self

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

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the whole matrix in memory of its own."""

    @abstractmethod
    def gather(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the given rows (int64 [n], on the CPU) as `dtype` [n, columns]; decodes only the tiles that hold them."""

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes `inputs @ matrix.T + bias`; see `CompressedLinear.forward`.

        Gradients flow to `inputs` and `bias`; the weight is decoded once more for them, not kept.
        """
        if torch.is_grad_enabled() and (
            inputs.requires_grad or (bias is not None and bias.requires_grad)
        ):
            result: torch.Tensor = _FrozenCompressed.apply(inputs, self, bias)
            return result
        return self._product(inputs, bias)

    def _product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with self.lock:
            parts = [
                functional.linear(
                    inputs, weight.to(inputs.device), None if bias is None else bias[rows]
                )
                for rows, weight in self.weights(inputs.dtype)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@dataclass(frozen=True, slots=True, eq=False)
class CompressedTensor(CodedMatrix):
    """A matrix whose chunks lie in the host's memory as they are stored.

    Attributes:
        stored: the tensor, reading from memory.
        decoder: what decodes it.
    """

    decoder: SharedDecoder

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

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the whole matrix in memory of its own."""
        out = empty_tensor((self.rows, self.cols), dtype)
        self.decode_bands(list(range(self.bands)), dtype, out)
        return out

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the matrix in blocks of rows, each in the scratch. Hold `lock`."""
        grid = self.stored.table.grid
        step = max(1, SCRATCH_ELEMENTS // max(1, grid.tile_rows * grid.cols))
        for first in range(0, self.bands, step):
            bands = list(range(first, min(first + step, self.bands)))
            weight = self.decoder.decoded(self, bands, dtype)
            yield slice(first * grid.tile_rows, first * grid.tile_rows + len(weight)), weight

    def gather(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the given rows (int64 [n], on the CPU) as `dtype` [n, columns]; decodes only the tiles that hold them."""
        grid = self.stored.table.grid
        out = torch.empty(len(rows), self.cols, dtype=dtype)
        bands = torch.div(rows, grid.tile_rows, rounding_mode="floor")
        wanted = sorted(set(bands.tolist()))
        step = max(1, SCRATCH_ELEMENTS // max(1, grid.tile_rows * grid.cols))
        with self.decoder.lock:
            for first in range(0, len(wanted), step):
                part = wanted[first : first + step]
                decoded, start = self.decoder.decoded(self, part, dtype), 0
                for band in part:
                    chosen = (bands == band).nonzero().flatten()
                    out[chosen] = decoded[start + rows[chosen] - band * grid.tile_rows]
                    start += self.height(band)
        return out

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


class _FrozenCompressed(torch.autograd.Function):
    """The product with a compressed matrix, with gradients for inputs and bias."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix._product(inputs, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrix, to_inputs = ctx.matrix, None
        if ctx.needs_input_grad[0]:
            with matrix.lock:
                for rows, weight in matrix.weights(grad.dtype):
                    part = grad[..., rows] @ weight.to(grad.device)
                    to_inputs = part if to_inputs is None else to_inputs.add_(part)
        to_bias = grad.reshape(-1, matrix.rows).sum(0) if ctx.needs_input_grad[2] else None
        return to_inputs, None, to_bias


class CompressedWeight(nn.Module):
    """What compressed modules have in common: a coded matrix instead of a weight.

    Attributes:
        tensor: the matrix.
        weight_dtype: dtype of `weight`, which is decoded anew each time; follows `model.to(dtype)`.
    """

    tensor: CodedMatrix
    weight_dtype: torch.dtype

    def __getattr__(self, name: str) -> Any:
        """Decodes `weight` for code that reaches for it instead of calling the module."""
        if name == "weight" and "tensor" in self.__dict__:
            return self.tensor.dense(self.weight_dtype)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self


class CompressedLinear(CompressedWeight, nn.Linear):
    """A linear layer with a coded weight [out, in]."""

    @torch.compiler.disable
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps float [..., in] to [..., out] of the same dtype: the bits of dense loading."""
        return self.tensor.linear(inputs, self.bias)


class CompressedEmbedding(CompressedWeight, nn.Embedding):
    """An embedding with a coded weight [vocabulary, width]."""

    @torch.compiler.disable
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps integer [...] to `weight_dtype` [..., width]."""
        vectors = self.tensor.gather(ids.reshape(-1).to("cpu", torch.int64), self.weight_dtype)
        return vectors.to(ids.device).view(*ids.shape, self.embedding_dim)


def compressed_twin(
    module: nn.Module, payload: Callable[[], CodedMatrix]
) -> CompressedWeight | None:
    """Returns a compressed module in place of a plain linear layer or embedding; None for anything else.

    Args:
        module: the plain module, on any device.
        payload: gives the coded weight; called only where a module is made.
    """
    if type(module) is nn.Linear:
        cls: type[CompressedWeight] = CompressedLinear
        kept: tuple[str, ...] = ("in_features", "out_features")
    elif type(module) is nn.Embedding and module.max_norm is None:
        cls = CompressedEmbedding
        kept = (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        )
    else:
        return None
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    for name in kept:
        setattr(twin, name, getattr(module, name))
    if isinstance(module, nn.Linear):
        twin.register_parameter("bias", module.bias)
    twin.tensor, twin.weight_dtype = payload(), module.weight.dtype
    twin.train(module.training)
    return twin
