"""`python -m benchmarks.quality.ablation`: what parts of the quantizer are worth at equal bits.

Each row is one variant at one rate: the share of the gradients in the steps of whole tensors, the
text of the calibration and its start token, damping of sums, error feedback. Models are
`smollm2`, `qwen` (benchmarks/quality/models.py) or any folder; every combination of the options is
tried, on two texts. Synthetic: low bits of `smollm2` and `qwen` are noise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.quality import models
from benchmarks.quality.trials import Quality, Trials
from codecllm.calibrator import text as calibration_text
from codecllm.calibrator.gradients import squared_gradients
from codecllm.calibrator.inputs import input_products
from codecllm.calibrator.names import by_source
from codecllm.calibrator.text import (
    LENGTH,
    REFINED_LENGTH,
    SEQUENCES,
    begins_with_start,
    file_text,
    mixed_text,
    own_text,
    random_text,
)
from codecllm.converter.rate import allocation
from codecllm.converter.rate.allocation import Statistics
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.products import InputProducts
from codecllm.converter.source.source import SourceModel
from codecllm.loader.hf.plain import load_plain
from codecllm.quality import DEFAULT_CALIBRATION, quantized_tensors

START = "self-after-start"
"""The model's own text with the start token that it was written after, whatever its tokenizer does.
"""

DAMPING, POWERS = allocation.COLUMN_DAMPING, (0.0, allocation.LEVEL_POWER, 1.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to choose steps and codes.

    Attributes:
        text: `text`, `self`, `START`, `random`, `none`, a text file, or two of them with a plus
            between.
        sequences: of the calibration, each of `LENGTH` tokens.
        power: `allocation.LEVEL_POWER`.
        damping: of the sums of rows and columns.
        refine: whether codes are chosen with feedback.
    """

    text: str
    sequences: int
    power: float
    damping: float
    refine: bool


@dataclass(slots=True)
class Seen:
    """What a calibration gives: sensitivities, and products of inputs where feedback is tried."""

    statistics: Statistics
    products: InputProducts | None = None


def calibrated(
    trials: Trials, text: str, *, refine: bool, refined_length: int = REFINED_LENGTH
) -> Seen:
    """Runs the source model on a text, as `codecllm.calibrator.calibrate` does.

    Args:
        trials: the model.
        text: as in `Variant`.
        refine: whether products of inputs are wanted too.
        refined_length: tokens of each sequence then.
    """
    if text == "none":
        return Seen({})
    model = load_plain(trials.source, torch.float32).eval()
    length = refined_length if refine else LENGTH
    tokens = _tokens(model, trials.source, text, length)
    with SourceModel(trials.source) as source:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        names = quantized_tensors(source, trials.options(5))
    sums = squared_gradients(model, tokens[:, :LENGTH])
    products = input_products(model, tokens, shapes, names) if refine else None
    return Seen(by_source(model, sums, set(shapes)), products)


def _tokens(model: Any, folder: Path, kind: str, length: int) -> torch.Tensor:
    if "+" in kind:
        # Half of each: a variant has as many tokens as the others.
        parts = [_tokens(model, folder, part, length) for part in kind.split("+")]
        return torch.cat([part[: len(part) // len(parts)] for part in parts])
    if kind in ("self", START):
        keep = kind == START or begins_with_start(folder)
        tokens = own_text(model, length, keep_start=keep)
        assert tokens is not None
        return tokens
    if kind == "text":
        tokens = mixed_text(model, folder, length)
        assert tokens is not None
        return tokens
    return (
        random_text(model, length)
        if kind == "random"
        else file_text(model, folder, Path(kind), length)
    )


def main(
    model: Annotated[str, typer.Argument(help="smollm2, qwen or a folder.")] = "smollm2",
    rates: Annotated[
        list[float] | None, typer.Option("--bits", help="Bits per weight; may be repeated.")
    ] = None,
    powers: Annotated[
        list[float] | None,
        typer.Option("--power", help="Share of the gradients in a tensor's level; repeatable."),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate", help=f"text, self, {START}, random, none, FILE, A+B; repeatable."
        ),
    ] = None,
    dampings: Annotated[
        list[float] | None, typer.Option("--damping", help="Of rows and columns; repeatable.")
    ] = None,
    sequence_counts: Annotated[
        list[int] | None, typer.Option("--sequences", help=f"Of {LENGTH} tokens; repeatable.")
    ] = None,
    refine: Annotated[bool, typer.Option(help="Each variant with feedback too.")] = False,
    all_matrices: Annotated[bool, typer.Option(help="Embeddings and head too.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 768,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Tries every combination."""
    trials = Trials(models.folder_of(model), tokens, all_matrices=all_matrices)
    for text, sequences in product(texts or [DEFAULT_CALIBRATION], sequence_counts or [SEQUENCES]):
        calibration_text.SEQUENCES = sequences
        seen = calibrated(trials, text, refine=refine)
        feedback = None if seen.products is None else Feedback(seen.products)
        for damping, power, bits, refiner in product(
            dampings or [DAMPING],
            powers or POWERS,
            rates or [3.0, 4.0, 5.0],
            [None, feedback] if feedback else [None],
        ):
            allocation.LEVEL_POWER = power
            allocation.ROW_DAMPING = allocation.COLUMN_DAMPING = damping
            result = trials.quality(bits, seen.statistics, refiner)
            variant = Variant(text, sequences, power, damping, refiner is not None)
            _print(variant, result, as_json)


def _print(variant: Variant, result: Quality, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(variant), **asdict(result)}))
        return
    kl = " ".join(f"{value:.4f}" for value in result.kl)
    top1 = " ".join(f"{value:.1%}" for value in result.top1)
    parts = "+".join(Path(part).name for part in variant.text.split("+"))
    name = (
        f"{parts}, {variant.sequences} sequences, power {variant.power:g}, "
        f"damping {variant.damping:g}"
    )
    refined = ", refined" if variant.refine else ""
    Console(width=140).print(f"{result.bits:.3f} bits  KL {kl}  top-1 {top1}  ({name}{refined})")


if __name__ == "__main__":
    typer.run(main)
