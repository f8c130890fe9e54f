"""`python -m benchmarks.bits`: KL divergence by bits per weight, of a SmolLM2 with noise.

The model is calibrated once, converted at every rate, and each container is evaluated on two texts:
the built-in one, and `second_text.txt`. Kinds of calibration beside the default show the value of
the statistics; `none` takes steps from the weights alone; `inputs`, which no conversion offers,
multiplies these by the mean squares of the layers' inputs^-1/2, known from 128 tokens of the
model's own. Synthetic: `demo.models.smollm2_realistic` adds noise to 4-bit weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from codecllm.calibrator import Calibrated, calibrate
from codecllm.calibrator.activations import mean_squared_inputs
from codecllm.calibrator.text import own_text, record
from codecllm.converter import (
    ConversionReport,
    ConvertOptions,
    ParamsChoice,
    Rate,
    convert,
    convert_model,
)
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.formats.codecs.entropy import counted_entropy_bits
from codecllm.formats.container import Container
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.int8 import join_codes
from codecllm.formats.shards.side_tensors import scale_bytes
from codecllm.formats.stored_tensor import StoredTensor, sound
from codecllm.loader.hf.plain import load_plain
from codecllm.quality import DEFAULT_CALIBRATION, quantized_tensors
from codecllm.verifier.evaluation import Score, evaluate
from demo import models

RATES = (3.1, 4.0, 5.0, 6.1)
LAYERS_ONLY = ("*embed*", "lm_head*")
SECOND_TEXT = Path(__file__).parent / "second_text.txt"


@dataclass(frozen=True, slots=True)
class Row:
    """One container.

    Attributes:
        calibrated: kind of calibration.
        asked: bits per weight that were asked for; 0 for plain int8.
        refined: whether codes were chosen with error feedback.
        bits: stored per quantized weight, everything counted.
        entropy_gap: bits per quantized weight that the payload and its tables take beyond the
            order-0 entropy of each tile's codes.
        side: bits per quantized weight of scales and groups.
        stored_bytes: of all tensors.
        kl, top1: on the prose.
        kl_other, top1_other: on the second text.
    """

    calibrated: str
    asked: float
    refined: bool
    bits: float
    entropy_gap: float
    side: float
    stored_bytes: int
    kl: float
    top1: float
    kl_other: float
    top1_other: float


@dataclass(frozen=True, slots=True)
class Made:
    """A container that was made: its report, kind of calibration and bits that were asked for."""

    report: ConversionReport
    calibrated: str
    asked: float


def measure(source: Path, containers: list[Made], tokens: int) -> list[Row]:
    """Evaluates containers on both texts; the source runs once on each."""
    outs: list[str | Path] = [made.report.out for made in containers]
    prose, second = (
        evaluate(source, outs, text=text, max_tokens=tokens).scores
        for text in (None, SECOND_TEXT.read_text())
    )
    return [_row(made, scores) for made, *scores in zip(containers, prose, second, strict=True)]


def _row(made: Made, scores: list[Score]) -> Row:
    report = made.report
    int8_records = [record for record in report.manifest.tensors if isinstance(record, Int8Tensor)]
    weights = sum(record.elements for record in int8_records)
    with Container(report.out) as container:
        gap = math.fsum(_bits_over_entropy(container, record) for record in int8_records)
    side = 8 * sum(scale_bytes(record) for record in int8_records)
    return Row(
        made.calibrated,
        made.asked,
        bool(report.manifest.options.refine),
        report.quantized_bits_per_weight,
        gap / weights,
        side / weights,
        report.stored_bytes,
        scores[0].mean_kl,
        scores[0].top1,
        scores[1].mean_kl,
        scores[1].top1,
    )


def _bits_over_entropy(container: Container, record: Int8Tensor) -> float:
    """Returns the bits of slots, chunk records and tables above the entropy of each tile."""
    tensor = container.tensor(record.name)
    assert isinstance(tensor, StoredTensor)
    table, planes = tensor.table, tensor.table.planes
    excess_bits = 8.0 * (int(table.offsets[-1]) + table.records.nbytes + (record.tables_bytes or 0))
    for tile in range(len(table.grid)):
        first, last = tile * planes, (tile + 1) * planes
        slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
        low, *high = (
            sound(symbols).view(np.int8) for symbols in tensor.decode_run(first, last, slots, first)
        )
        codes = join_codes(low, high[0], table.low_bits[tile]) if high else low
        excess_bits -= counted_entropy_bits(np.bincount(codes.astype(np.int64) - int(codes.min())))
    return excess_bits


def _calibrated(source: Path, kind: str, refined: Collection[str]) -> Calibrated | None:
    if kind == "none":
        return None
    with SourceModel(source) as source_model:
        if kind != "inputs":
            return calibrate(source_model, kind, refined=refined)
        source_names = set(source_model.tensors)
    model = load_plain(source, torch.float32).eval()
    tokens = own_text(model)
    assert tokens is not None
    tokens = tokens[:2]
    return Calibrated(mean_squared_inputs(model, tokens, source_names), record("inputs", tokens))


def main(
    rates: Annotated[
        list[float] | None, typer.Option("--bits", help="Bits per weight; may be repeated.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--calibrate", help="text, self, random, none, inputs; may be repeated."),
    ] = None,
    layers: Annotated[
        bool, typer.Option(help="Quantize the linear layers only, not the embeddings.")
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(help="Each rate with --refine too, where the kind of calibration allows it."),
    ] = False,
    int8: Annotated[bool, typer.Option(help="Plain int8 too.")] = True,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 2048,
    keep: Annotated[Path | None, typer.Option(help="Leave the containers in this folder.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list instead of a table.")
    ] = False,
) -> None:
    """Converts and evaluates."""
    source = models.smollm2_realistic()
    options: dict[str, Any] = {"exclude": LAYERS_ONLY if layers else (), "force": True}
    containers: list[Made] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        if int8:
            containers.append(Made(convert(source, folder / "int8", **options), "", 0.0))
        for kind in kinds or [DEFAULT_CALIBRATION]:
            with SourceModel(source) as source_model:
                names = quantized_tensors(source_model, ConvertOptions(**options)) if refine else ()
            calibration = _calibrated(source, kind, names)
            statistics = {} if calibration is None else calibration.statistics
            feedback = (
                None
                if calibration is None or calibration.products is None
                else Feedback(calibration.products)
            )
            for bits, refiner in product(rates or RATES, (None, feedback) if feedback else (None,)):
                rate = Rate(bits=bits, calibrate=kind, refine=refiner is not None)
                rate_options = ConvertOptions(rate=rate, **options)
                out = folder / f"{kind}-{bits:g}{'-refined' if refiner else ''}"
                with SourceModel(source) as source_model:
                    fitted_steps = fit(source_model, rate_options, statistics, refiner)
                    choice = ParamsChoice(fitted_steps, rate, calibration and calibration.record)
                    report = convert_model(source_model, out, rate_options, choice=choice)
                containers.append(Made(report, kind, bits))
                Console(stderr=True).print(out.name, f"{report.seconds:.1f} s of conversion")
        rows = measure(source, containers, tokens)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "calibrated",
        "asked",
        "bits",
        "over entropy",
        "scales",
        "MB",
        "KL prose",
        "top-1",
        "KL second",
        "top-1",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = (
            f"{row.bits:.3f}",
            f"{row.entropy_gap:.3f}",
            f"{row.side:.3f}",
            f"{row.stored_bytes / 1e6:.1f}",
        )
        quality = (
            f"{row.kl:.5f}",
            f"{row.top1:.1%}",
            f"{row.kl_other:.5f}",
            f"{row.top1_other:.1%}",
        )
        table.add_row(
            row.calibrated + (", refined" if row.refined else ""),
            f"{row.asked:g}" if row.asked else "int8",
            *sizes,
            *quality,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
