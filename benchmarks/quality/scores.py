"""Scores candidates on several texts, each loaded once; every figure is on disk as it comes.

The figures are those of `codecllm eval` on one text at a time.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from codecllm.loader.hf.folder import read_tokenizer, start_of
from codecllm.loader.places import device_of
from codecllm.verifier.evaluation.candidates import find_candidate
from codecllm.verifier.evaluation.divergence import Base
from codecllm.verifier.evaluation.evaluate import Score, sample_text

SECOND_TEXT = Path(__file__).parent.parent / "second_text.txt"
WINDOW = 512
_NEAR = 0.02
"""Bits that a container may miss its rate by and still be compared."""


class Scores:
    """Scores of candidates of one base model, kept in a JSON file.

    A candidate that the file has is not scored again.
    """

    def __init__(self, base: Path, file: Path, *, tokens: tuple[int, int], device: str) -> None:
        """Reads the file, if it is there.

        Args:
            base: folder of the base model.
            file: JSON: name of a text -> name of a candidate -> its score.
            tokens: of the first text and of the second.
            device: where the models run.
        """
        self._base, self._file, self._tokens = base, file, tokens
        self._place = device_of(device)
        self._readings: dict[str, Base] = {}
        self.texts: dict[str, dict[str, dict[str, Any]]] = {"first": {}, "second": {}}
        if file.exists():
            self.texts = json.loads(file.read_text(encoding="utf-8"))

    def add(self, candidates: Iterable[Path]) -> None:
        """Scores candidates; one that fails is named on stderr, and the others go on."""
        for path in candidates:
            if path.name in self.names:
                continue
            try:
                self._score(path)
            except Exception as exc:  # whatever a candidate fails by must not cost the others
                print(f"{path.name}: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)

    @property
    def names(self) -> set[str]:
        """Names of the candidates that have all scores."""
        return set.intersection(*(set(scores) for scores in self.texts.values()))

    def _score(self, path: Path) -> None:
        self._read()
        candidate = find_candidate(path)
        model = candidate.load(torch.float32, None, self._place)
        bits = candidate.bits()
        for text, reading in self._readings.items():
            found = reading.compare(model)
            score = Score(
                path.name,
                candidate.kind,
                bits.per_weight,
                bits.per_layer_weight,
                bits.stored // 8,
                found.mean_kl,
                found.kl_99,
                found.top1,
                found.perplexities[1],
            )
            self.texts[text][path.name] = asdict(score)
            figures = f"{score.layer_bits_per_weight:.3f} bits, KL {score.mean_kl:.5f}"
            print(f"{path.name}, {text} text: {figures}, top-1 {score.top1:.1%}", flush=True)
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(self.texts, indent=1) + "\n", encoding="utf-8")
        written.replace(self._file)

    def _read(self) -> None:
        if self._readings:
            return
        base = find_candidate(self._base).load(torch.float32, None, self._place)
        tokenizer = read_tokenizer(self._base)
        given = {"first": sample_text(), "second": SECOND_TEXT.read_text(encoding="utf-8")}
        for (text, words), tokens in zip(given.items(), self._tokens, strict=True):
            ids = tokenizer(words)["input_ids"]
            self._readings[text] = Base(base, ids[:tokens], WINDOW, start_of(tokenizer, ids))


def curve(scores: dict[str, dict[str, Any]], title: str) -> list[tuple[float, float]]:
    """Returns bits and KL of the candidates `TITLE-RATE`, fewest bits first.

    Args:
        scores: name of a candidate -> its score on one text.
        title: first part of their names.
    """
    return sorted(
        (score["layer_bits_per_weight"], score["mean_kl"])
        for name, score in scores.items()
        if re.fullmatch(re.escape(title) + r"-[\d.]+", name)
    )


def kl_at(curve: list[tuple[float, float]], bits: float) -> float | None:
    """Returns KL at a rate, log KL interpolated; within 0.02 bit outside of the curve too.

    Args:
        curve: bits and KL, fewest bits first.
        bits: per weight.
    """
    near = min(curve, key=lambda point: abs(point[0] - bits), default=None)
    for (fewer, high), (more, low) in pairwise(curve):
        if fewer <= bits <= more:
            return high * (low / high) ** ((bits - fewer) / (more - fewer))
    return near[1] if near is not None and abs(near[0] - bits) <= _NEAR else None


def bits_at(curve: list[tuple[float, float]], kl: float) -> float | None:
    """Returns the bits at which a curve has a KL, or None outside of it.

    Args:
        curve: bits and KL, fewest bits first.
        kl: per token, in nats.
    """
    for (fewer, high), (more, low) in pairwise(curve):
        if low <= kl <= high:
            return fewer + (more - fewer) * math.log(high / kl) / math.log(high / low)
    return None
