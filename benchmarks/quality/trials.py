"""A model, quantized in memory as a conversion would do it, and scored on two texts.

No container is written: a trial of SmolLM2-135M takes seconds. Steps, codes and predicted bits come
from the code of the conversion (`converter.rate.search.fit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.converter import ConvertOptions, Rate
from codecllm.converter.encode.quantize import as_float32, round_toward_zero
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.allocation import Statistics
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.fitted import FittedParams
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.loader.hf.folder import read_tokenizer, start_of
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier.evaluation.divergence import Base, Divergence
from codecllm.verifier.evaluation.evaluate import sample_text

LAYERS_ONLY = ("*embed*", "lm_head*")
SECOND_TEXT = Path(__file__).parent.parent / "second_text.txt"
WINDOW = 512


@dataclass(frozen=True, slots=True)
class Quality:
    """A quantized model beside its source.

    Attributes:
        bits: predicted per quantized weight, everything counted.
        kl: KL(source || quantized) per token in nats, one figure for each text.
        top1: share of tokens with the same most likely successor, one for each text.
    """

    bits: float
    kl: tuple[float, ...]
    top1: tuple[float, ...]


class Trials:
    """A source model and its quantized twin, both in float32."""

    def __init__(self, source: Path, tokens: int, *, all_matrices: bool = False) -> None:
        """Loads the model twice and reads the texts.

        Args:
            source: folder of a causal language model with a tokenizer.
            tokens: tokens of each text.
            all_matrices: whether embeddings and head are quantized too.
        """
        self.source = source
        self._exclude = () if all_matrices else LAYERS_ONLY
        base = load_plain(source, torch.float32).eval()
        self._twin: Any = load_plain(source, torch.float32).eval()
        tokenizer = read_tokenizer(source)
        texts = (sample_text(), SECOND_TEXT.read_text(encoding="utf-8"))
        all_ids = [tokenizer(text)["input_ids"][:tokens] for text in texts]
        self._bases = [Base(base, ids, WINDOW, start_of(tokenizer, ids)) for ids in all_ids]

    def options(self, bits: float, *, refine: bool = False) -> ConvertOptions:
        """Returns the options of the conversion that a trial stands for."""
        rate = Rate(bits=bits, calibrate="self", refine=refine)
        return ConvertOptions(rate=rate, exclude=self._exclude)

    def quality(
        self, bits: float, statistics: Statistics, feedback: Feedback | None = None
    ) -> Quality:
        """Quantizes the twin and scores it.

        Args:
            bits: per weight, to reach.
            statistics: sensitivities, as a calibration gives them.
            feedback: refines codes, or None.
        """
        options = self.options(bits, refine=feedback is not None)
        with SourceModel(self.source) as model:
            fitted_params = fit(model, options, statistics, feedback)
            for name, weights in dequantized(model, options, fitted_params):
                self.put(name, weights)
        scores = self.scores()
        return Quality(
            fitted_params.bits,
            tuple(score.mean_kl for score in scores),
            tuple(score.top1 for score in scores),
        )

    def put(self, name: str, weights: NDArray[np.float32]) -> None:
        """Gives a tensor of the twin other weights, float32 [rows, cols]."""
        target = self._twin.get_parameter(name)
        with torch.no_grad():
            target.copy_(torch.from_numpy(weights).reshape(target.shape))

    def scores(self) -> list[Divergence]:
        """Compares the twin with its source on each text."""
        return [base.compare(self._twin) for base in self._bases]


def dequantized(
    model: SourceModel, options: ConvertOptions, fitted_params: FittedParams
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields name and weights, float32 [rows, cols], of each tensor that gets parameters."""
    for plan in plan_conversion(model, options, accepts_params=True).tensors:
        params = fitted_params(plan) if plan.accepts_params else None
        if params is not None:
            step, codes = steps_and_codes(plan, params)
            yield plan.source.name, codes * step


def steps_and_codes(
    plan: TensorPlan, params: QuantParams
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns steps and codes of a tensor, both float32 [rows, cols]."""
    weights = weights_of(plan)
    rows, cols = weights.shape
    col_scale = np.ones(cols, np.float32) if params.col_scale is None else params.col_scale
    step = params.row_scale[:, None] * col_scale
    if params.codes is not None:
        return step, params.codes(0, rows).astype(np.float32)
    quotient, codes = weights / step, np.empty_like(weights)
    if params.deadzone:
        round_toward_zero(quotient, params.deadzone, codes)
    else:
        np.rint(quotient, out=codes)
    return step, codes


def weights_of(plan: TensorPlan) -> NDArray[np.float32]:
    """Returns the weights of a tensor, float32 [rows, cols]."""
    rows, cols = plan.matrix
    words = plan.source.read_elements(0, rows * cols).reshape(rows, cols)
    return as_float32(words, plan.source.dtype.name, np.empty(words.shape, np.float32))
