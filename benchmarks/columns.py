"""`python -m benchmarks.columns`: cost of column scales and wide codes, against the entropy.

Weights are Gaussian, or matrices of SmolLM2 with realistic bits; scales of columns are drawn
log-normally (sigma 0.5; equal in the second table), rows get `step` times their root mean square.
The first table cuts the columns, by the size of their codes, into 1 to 16 groups: one group is the
case of a container without groups. The second lets codes leave [-127, 127].
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from codecllm.converter import ParamsChoice, convert
from codecllm.converter.plan.params import QuantParams, column_tiles, like_columns
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.source import SourceModel
from codecllm.formats.codecs import CodecName
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.reference import read_codes
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.shards.chunk_table import slot_bytes
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter
from codecllm.formats.stored_tensor import StoredTensor
from demo import models

GROUPS = (1, 4, 8, 16)
STEPS = (0.12, 0.25, 0.5, 0.8)
WIDE_STEPS = (0.03, 0.025, 0.022, 0.02, 0.017)
MATRICES = ("10.mlp.up_proj.weight", "3.mlp.down_proj.weight", "10.self_attn.q_proj.weight")


@dataclass(frozen=True, slots=True)
class Row:
    """One matrix under one choice of steps; bits a weight of slots, chunk records and tables.

    Attributes:
        weights: name of the coded weights.
        step: in root mean squares of a row.
        groups: tiles side by side.
        escapes: share of codes outside [-127, 127].
        entropy: of the codes, given one table for each group of columns.
        zstd, rans: stored bits.
    """

    weights: str
    step: float
    groups: int
    escapes: float
    entropy: float
    zstd: float
    rans: float


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Print both tables."""
    narrow = [
        row
        for name, weights in matrices()
        for step in STEPS
        for row in measure(name, weights, step, GROUPS)
    ]
    gaussian = np.random.default_rng(1).standard_normal((1024, 2048)).astype(np.float32)
    wide = [
        row
        for step in WIDE_STEPS
        for row in measure("Gaussian, 1024 x 2048", gaussian, step, (8,), sigma=0)
    ]
    if as_json:
        print(json.dumps([asdict(row) for row in narrow + wide], indent=1))
        return
    console = Console(width=130)
    console.print(_table("Groups of like columns", narrow), _table("Wide codes", wide))


def matrices() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields names and weights: a Gaussian matrix and some of SmolLM2's."""
    yield (
        "Gaussian, 1024 x 2048",
        np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32),
    )
    with SourceModel(models.smollm2_realistic()) as source:
        for name in MATRICES:
            tensor = source.tensors[f"model.layers.{name}"]
            weights = float32_from_bits(
                tensor.read_elements(0, tensor.entry.elements), tensor.dtype.name
            )
            yield name, weights.reshape(tensor.shape)


def measure(
    name: str,
    weights: NDArray[np.float32],
    step: float,
    groups: tuple[int, ...],
    sigma: float = 0.5,
) -> Iterator[Row]:
    """Converts a matrix under one step with several groupings and either codec; yields results."""
    factors = np.exp(sigma * np.random.default_rng(2).standard_normal(weights.shape[1])).astype(
        np.float32
    )
    scaled_weights = weights / factors
    rows = (step * np.sqrt(np.square(scaled_weights).mean(axis=1))).astype(np.float32)
    squares = np.square(scaled_weights, dtype=np.float64).mean(axis=0)
    for count in groups:
        tile = column_tiles(*weights.shape, groups=count)
        steps = QuantParams(rows, factors, like_columns(squares, tile[1]), tile)
        stored_bits = {codec: _stored(weights, steps, codec) for codec in ("zstd", "rans")}
        codes = stored_bits["zstd"][1][:, steps.order]
        parts = [codes[:, col : col + tile[1]] for col in range(0, codes.shape[1], tile[1])]
        entropy = sum(_entropy_bits(part) for part in parts) / codes.size
        escapes = float((np.abs(codes.astype(np.int32)) > 127).mean())
        yield Row(
            name, step, len(parts), escapes, entropy, stored_bits["zstd"][0], stored_bits["rans"][0]
        )


def _stored(
    weights: NDArray[np.float32], steps: QuantParams, codec: CodecName
) -> tuple[float, NDArray[np.signedinteger]]:
    """Returns bits per weight and the codes of a container of one matrix."""

    def provide(plan: TensorPlan) -> QuantParams:
        return steps

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        writer = ShardWriter(
            source / "model.safetensors",
            [PlannedTensor("w", DTYPES["F32"], weights.shape, weights.nbytes)],
            {"format": "pt"},
        )
        writer.add("w", "F32", weights.shape, weights.tobytes())
        writer.finish()
        convert(source, out, codec=codec, choice=ParamsChoice(provide))
        with Container(out) as container:
            tensor = container.tensor("w")
            assert isinstance(tensor, StoredTensor)
            size = sum(slot_bytes(chunk.stored_bytes) + 16 for chunk in tensor.table.chunks)
            return 8 * (size + (tensor.record.tables_bytes or 0)) / weights.size, read_codes(tensor)


def _entropy_bits(codes: NDArray[np.signedinteger]) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    return float(codes.size * np.log2(codes.size) - (counts * np.log2(counts)).sum())


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for column in ("weights", "step", "groups", "escapes", "entropy", "zstd", "rans"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for row in rows:
        bits_cells = [f"{bits:.3f} ({bits - row.entropy:+.3f})" for bits in (row.zstd, row.rans)]
        table.add_row(
            row.weights,
            f"{row.step}",
            f"{row.groups}",
            f"{row.escapes:.2%}",
            f"{row.entropy:.3f}",
            *bits_cells,
        )
    return table


if __name__ == "__main__":
    typer.run(main)
