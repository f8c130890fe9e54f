"""`codecllm eval`: a base model and candidates of it, scored on one text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.arguments.check import check_arguments, integer
from codecllm.formats.errors import SchemaError, UsageError
from codecllm.loader.hf.folder import encoded, read_gguf_tokenizer, read_tokenizer, start_of
from codecllm.loader.hf.quiet import silenced
from codecllm.loader.places import device_of
from codecllm.loader.torch_tensors import check_dtype
from codecllm.verifier.evaluation.candidates import Candidate, find_candidate
from codecllm.verifier.evaluation.divergence import Base

OnToken = Callable[[str, int, int], None]
"""Called with a candidate's name, the tokens done and all of them."""


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate.

    Attributes:
        name: as it was given.
        kind: `container`, `folder`, `dequantized` (a folder that states the bits of the format it
            came from) or `gguf`.
        bits_per_weight: stored bits of all tensors / weights.
        layer_bits_per_weight: the same over the matrices inside the layers.
        stored_bytes: bytes of all tensors.
        mean_kl: KL(base || candidate) per token, nats.
        kl_99: the 99th percentile of it.
        top1: share of tokens with the same most likely successor.
        perplexity: of the candidate on the text.
    """

    name: str
    kind: str
    bits_per_weight: float
    layer_bits_per_weight: float
    stored_bytes: int
    mean_kl: float
    kl_99: float
    top1: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of all candidates.

    Attributes:
        base: name of the base model.
        base_bits_per_weight: stored bits of all tensors of the base / weights.
        base_perplexity: of the base on the text; NaN without candidates.
        tokens: tokens of the text that were predicted.
        dtype: in which the models computed.
        scores: in the order of the candidates.
    """

    base: str
    base_bits_per_weight: float
    base_perplexity: float
    tokens: int
    dtype: str
    scores: list[Score]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def sample_text() -> str:
    """Returns the built-in text, which is in the public domain.

    It has passages of Carroll, Lincoln, Jefferson, Darwin, Dickens, Thoreau and Doyle.
    """
    return files("codecllm.verifier.evaluation").joinpath("sample.txt").read_text(encoding="utf-8")


def evaluate(
    base: str | Path,
    candidates: list[str | Path],
    *,
    text: str | None = None,
    max_tokens: int = 2048,
    window: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    workers: int | None = None,
    progress: OnToken | None = None,
) -> Evaluation:
    """Compares candidates with their base on a text.

    All models compute in `dtype`, so that only their weights differ. The base and one candidate are
    in memory at a time. Where the base's tokenizer begins a text with a start token, every window
    begins with it: a model that was trained so is distorted without.

    Args:
        base: Hugging Face folder, Hub id or container.
        candidates: containers, folders, Hub ids or GGUF files.
        text: None takes the built-in one.
        max_tokens: how much of the text at most.
        window: tokens that a model sees at once.
        dtype: dtype of weights and arithmetic.
        device: `cpu`, `cuda`, `cuda:N` or `auto`: where all models run.
        workers: decoding threads.
        progress: called along the way.

    Raises:
        UsageError: the text is too short, or the base is no causal language model with a tokenizer.
        CodecLLMError: a model cannot be loaded.
    """
    check_arguments(base=base, candidates=candidates, text=text, workers=workers, progress=progress)
    max_tokens = integer(2)(max_tokens, "max_tokens")
    window = integer(2)(window, "window")
    check_dtype(dtype)
    if not candidates:
        raise UsageError("no candidate was given")
    place = device_of(device)
    reference = find_candidate(base)
    models = [find_candidate(candidate) for candidate in candidates]
    # The base is loaded first: without its tokenizer no candidate needs to be.
    model = reference.load(dtype, workers, place)
    tokens, start = _tokens(reference, model, sample_text() if text is None else text)
    reading = Base(model, tokens[:max_tokens], min(window, _longest(model)), start)
    scores: list[Score] = []
    base_perplexity = math.nan
    token_count = 0
    for candidate in models:
        other = candidate.load(dtype, workers, place)
        divergence = reading.compare(other, _reporter(progress, candidate.name))
        # The next candidate needs the memory: at most two models are loaded.
        del other
        base_perplexity, perplexity = divergence.perplexities
        token_count = len(divergence.kl)
        bits = candidate.bits()
        figures = (
            bits.per_weight,
            bits.per_layer_weight,
            bits.stored // 8,
            divergence.mean_kl,
            divergence.kl_99,
            divergence.top1,
            perplexity,
        )
        scores.append(Score(candidate.name, candidate.kind, *figures))
    name = str(dtype).removeprefix("torch.")
    return Evaluation(
        str(base), reference.bits().per_weight, base_perplexity, token_count, name, scores
    )


def tokenizer_of(reference: Candidate, model: Any) -> Any:
    """Returns the tokenizer of a base model.

    Raises:
        UsageError: it is no causal language model, or has no tokenizer of use.
    """
    if model.config.is_encoder_decoder or not getattr(model, "can_generate", bool)():
        raise UsageError(f"{type(model).__name__} is no causal language model", file=reference.name)
    try:
        read = read_gguf_tokenizer if reference.kind == "gguf" else read_tokenizer
        return read(reference.path)
    except SchemaError as exc:
        raise UsageError(f"the base has no usable tokenizer ({exc})", file=reference.name) from exc


def _tokens(reference: Candidate, model: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a text, and the start token that they begin with, or nothing."""
    tokenizer = tokenizer_of(reference, model)
    with silenced():  # longer than the model's context: the text is read in windows
        tokens: list[int] = encoded(tokenizer, text)["input_ids"]
    if len(tokens) < 2:
        raise UsageError("the text has fewer than two tokens", got=repr(text[:40]))
    return tokens, start_of(tokenizer, tokens)


def _longest(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def _reporter(progress: OnToken | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
