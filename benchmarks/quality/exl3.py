"""`python -m benchmarks.quality.exl3 MODEL`: EXL3's quantizer beside ours, at equal bits.

Both quantize the linear layers and nothing else. EXL3 (`pip install exllamav3`; a GPU and nvcc)
takes text of its own; ours is converted at the bits that EXL3 stores: by default, with `--refine`,
and with `--refine` on EXL3's text. All candidates are scored on two texts in one process. Every
candidate and every score is on disk as soon as it is there: a run that was ended goes on where it
was. The table is Markdown.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.others import exl3
from benchmarks.others.quantizers import write_dequantized
from benchmarks.quality import models
from benchmarks.quality.blockwise import quantized_layers
from benchmarks.quality.containers import convert_at
from benchmarks.quality.scores import Scores, bits_at, curve, kl_at
from codecllm.loader.hf.folder import read_tokenizer
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.hf.quiet import without_progress_bars
from codecllm.loader.places import device_of
from codecllm.verifier.evaluation.candidates import STORED_BITS_NAME

RATES = (2.0, 2.5, 3.0, 4.0, 5.0)
CURVE = (2.8, 3.5, 4.6, 5.6)
"""More rates of ours, between which the bits at EXL3's KL are interpolated."""

DEFAULT, REFINED, SAME_TEXT = "ours-default", "ours-refined", "ours-refined-same-text"
"""First parts of our containers' names."""

_OURS = (DEFAULT, REFINED, SAME_TEXT)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        base: folder of the source.
        out: folder of everything that is made.
        rates: of EXL3.
        device: where all of it runs.
        sequences: of EXL3's calibration.
        length: tokens of each.
        tokens: of each text that candidates are scored on.
        quantizer: EXL3's, or another of the same signature.
        texts: EXL3's calibration texts.
    """

    base: Path
    out: Path
    rates: Sequence[float] = RATES
    device: str = "cuda"
    sequences: int = 64
    length: int = 1024
    tokens: int = 1024
    quantizer: exl3.Quantizer = exl3.quantize
    texts: Callable[[], list[str]] = exl3.texts

    def run(self, more: Sequence[float] = CURVE) -> None:
        """Makes and scores what is missing, and prints the tables.

        What matters most comes first: EXL3, ours at its bits, ours on its text, further rates.

        Args:
            more: further rates of ours.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        scores = Scores(
            self.base,
            self.out / "scores.json",
            tokens=(self.tokens, self.tokens),
            device=self.device,
        )
        ids = self.calibration()
        for rate in self.rates:
            _try(partial(self._exl3, scores, ids, rate))
        bits = [round(stored, 3) for stored, _ in curve(scores.texts["first"], "exl3")]
        same_text = str(self.out / "calibration.txt")
        for title, rates, options in (
            (DEFAULT, bits, {}),
            (REFINED, bits, {"refine": True}),
            (SAME_TEXT, bits, {"refine": True, "kind": same_text}),
            (REFINED, more, {"refine": True}),
            (DEFAULT, more, {}),
        ):
            containers = convert_at(
                self.base, self.out, title, rates, device=self.device, **options
            )
            _try(partial(scores.add, containers))
        print("\n".join(tables(scores.texts)), flush=True)

    def _exl3(self, scores: Scores, ids: torch.Tensor, rate: float) -> None:
        scores.add([self.make_exl3(ids, rate)])

    def calibration(self) -> torch.Tensor:
        """Returns EXL3's text, int64 [sequences, length]; writes it as a file for ours."""
        tokenizer = read_tokenizer(self.base)
        texts = self.texts()
        wanted = -(-self.sequences // len(texts))
        kinds = []
        for text in texts:
            ids = tokenizer(text[: 64 * wanted * self.length])["input_ids"]
            step = max(1, (len(ids) - self.length) // wanted)
            rows = [ids[first : first + self.length] for first in range(0, step * wanted, step)]
            kinds.append([row for row in rows if len(row) == self.length])
        # One of each kind in turn: ours reads the first tokens of the file.
        turns = zip_longest(*kinds)
        chosen = [row for turn in turns for row in turn if row is not None][: self.sequences]
        if not chosen:
            raise ValueError(f"no text has {self.length} tokens")
        (self.out / "calibration.txt").write_text(
            "\n\n".join(tokenizer.decode(row) for row in chosen) + "\n", encoding="utf-8"
        )
        return torch.tensor(chosen, device=device_of(self.device))

    def make_exl3(self, ids: torch.Tensor, rate: float) -> Path:
        """Quantizes with EXL3 at one rate; returns the folder, whose weights are float16."""
        folder = self.out / f"exl3-{rate:g}"
        if (folder / STORED_BITS_NAME).exists():
            return folder
        began = time.monotonic()
        with without_progress_bars():
            model = load_plain(self.base, torch.float32).to(device_of(self.device)).eval()

        def quantize(matrix: torch.Tensor, inputs: Any, number: int, rows: Any) -> Any:
            return self.quantizer(matrix, inputs, rate, number, rows)

        matrices = {
            name: (matrix.half(), bits)
            for name, matrix, bits in quantized_layers(model, ids, quantize)
        }
        write_dequantized(self.base, folder, matrices)
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return folder


def _try(work: Callable[[], None]) -> None:
    """Does a part of the work; one that fails is told on stderr."""
    try:
        work()
    except Exception as exc:  # one tool's failure must not cost the other candidates
        print(f"not made: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        traceback.print_exc()


def tables(texts: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Returns the lines of the tables, one for each text, in Markdown.

    Args:
        texts: name of a text -> name of a candidate -> its score, as `Scores` keeps them.
    """
    lines = []
    for title, scores in texts.items():
        found = list(scores.values())
        lines += [
            "",
            f"{title} text",
            "",
            "| EXL3, bits | KL | "
            + " | ".join(
                f"{name.removeprefix('ours-')}, same bits | bits at that KL" for name in _OURS
            )
            + " |",
            "|---" * (2 + 2 * len(_OURS)) + "|",
        ]
        for bits, kl in curve(scores, "exl3"):
            cells = [f"{bits:.3f}", f"{kl:.4f}"]
            for name in _OURS:
                ours = curve(scores, name)
                same, needed = kl_at(ours, bits), bits_at(ours, kl)
                cells.append("" if same is None else f"{same:.4f} ({same / kl:.2f} x)")
                cells.append("" if needed is None else f"{needed:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "| candidate | bits | KL | 99 % | top-1 |", "|---" * 5 + "|"]
        lines += [
            f"| {score['name']} | {score['layer_bits_per_weight']:.3f} | {score['mean_kl']:.4f} "
            f"| {score['kl_99']:.3f} | {score['top1']:.1%} |"
            for score in found
        ]
    return lines


def main(
    model: Annotated[str, typer.Argument(help="smollm2, qwen or a folder; widths of 128 n.")],
    rates: Annotated[
        list[float] | None, typer.Option("--bits", help="Of EXL3; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of candidates and scores.")] = Path(
        "benchmarks/out/exl3"
    ),
    device: Annotated[str, typer.Option(help="Where all of it runs.")] = "cuda",
    sequences: Annotated[int, typer.Option(help="Of EXL3's calibration.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Of each text that is scored.")] = 1024,
) -> None:
    """Compares EXL3 with ours on a model."""
    base = models.folder_of(model)
    comparison = Comparison(base, out, rates or RATES, device, sequences, length, tokens)
    comparison.run()


if __name__ == "__main__":
    typer.run(main)
