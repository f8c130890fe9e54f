"""The text of a calibration: shipped with codecllm, written by the model, random, or a file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codecllm.formats.arguments.inputs import read_user_text
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import UsageError, one_line
from codecllm.formats.manifest.records import Calibration
from codecllm.loader.hf.folder import encoded, read_tokenizer, start_of

SEQUENCES = 64
LENGTH = 64
"""How many sequences of how many tokens."""

REFINED_LENGTH = 256
"""Tokens of a sequence where the inputs of layers are to be known in pairs."""

SEED = 0

_FEWEST_KINDS = 64
"""Different tokens in the text of codecllm; even single bytes have more."""


def own_text(model: Any, length: int = LENGTH, *, keep_start: bool = False) -> torch.Tensor | None:
    """Samples sequences from a causal language model, at temperature 1, from its start token.

    Args:
        model: the model.
        length: tokens of a sequence.
        keep_start: whether sequences begin with the start token, which they were written after.

    Returns:
        int64 [SEQUENCES, length], on the CPU; None where the model keeps no keys and values of past
        tokens, so that writing would take too long.
    """
    generator = torch.Generator().manual_seed(SEED)
    current = torch.full((SEQUENCES, 1), _start_token(model.config), device=model.device)
    past = None
    tokens = [current.cpu()] if keep_start else []
    # Inference mode would leave tensors in the model's caches that no gradient may pass.
    with torch.no_grad():
        for _ in range(min(length, _longest(model) - 1) - len(tokens)):
            output = model(input_ids=current, past_key_values=past, use_cache=True)
            past = getattr(output, "past_key_values", None)
            if past is None:
                return None
            next_tokens = drawn(output.logits[:, -1].cpu(), generator)
            tokens.append(next_tokens)
            current = next_tokens.to(model.device)
    return torch.cat(tokens, 1)


def drawn(
    logits: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draws a token for each row of logits, float [sequences, vocabulary]: int64 [sequences, 1]."""
    # One random number a token: torch.multinomial draws one for every word of the vocabulary.
    shares = torch.softmax(logits.double(), -1).cumsum(-1)
    numbers = torch.rand((len(shares), 1), dtype=torch.float64, generator=generator)
    drawn_tokens = torch.searchsorted(shares, numbers * shares[:, -1:], right=True)
    return drawn_tokens.clamp_max(shares.shape[-1] - 1)


def random_text(model: Any, length: int = LENGTH) -> torch.Tensor:
    """Draws token ids evenly from the model's vocabulary: int64 [SEQUENCES, length]."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    if vocabulary < 1:
        raise UsageError(
            "the model's config names no vocab_size: it cannot be calibrated on tokens"
        )
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (SEQUENCES, min(length, _longest(model))), generator=generator)


def file_text(model: Any, folder: Path, path: Path, length: int = LENGTH) -> torch.Tensor:
    """Reads the first tokens of a text file: int64 [sequences, length], up to SEQUENCES of them.

    Each sequence begins with the start token, if the tokenizer gives a text one.

    Raises:
        UsageError: the file cannot be read, is too long or short, or the model has no tokenizer.
    """
    return _pieces(read_user_text(path), folder, min(length, _longest(model)))


def mixed_text(model: Any, folder: Path, length: int = LENGTH) -> torch.Tensor | None:
    """Returns the text that codecllm brings along: int64 [sequences, length], up to SEQUENCES.

    It was written for this purpose: encyclopedia, instructions, questions, dialogue, news, code,
    tables, and some other languages. Its pieces of REFINED_LENGTH are the same at every length,
    which takes their beginnings.

    Returns:
        None where the model's tokenizer is missing, makes too few tokens of it or hardly any that
        differ, or makes tokens that the model does not have.
    """
    text = files("codecllm.calibrator").joinpath("mixed_text.txt").read_text(encoding="utf-8")
    try:
        pieces = _pieces(text, folder, min(REFINED_LENGTH, _longest(model)))
    except UsageError:
        return None
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    # For a folder without tokenizer transformers may make one up, which knows no words.
    is_text = pieces.unique().numel() >= _FEWEST_KINDS and int(pieces.max()) < vocabulary
    return pieces[:, :length] if is_text else None


def _pieces(text: str, folder: Path, length: int) -> torch.Tensor:
    """Cuts a text into sequences, each with the start token that the tokenizer gives a text.

    Raises:
        UsageError: the text is too short, or the model has no tokenizer.
    """
    try:
        tokenizer = read_tokenizer(folder)
        part = text[: 64 * SEQUENCES * length]
        ids = [int(token) for token in encoded(tokenizer, part)["input_ids"]]
        start = start_of(tokenizer, ids)
    # Each of the many tokenizer classes of transformers raises errors of its own.
    except Exception as exc:
        raise UsageError(f"no usable tokenizer for a calibration text ({one_line(exc)})") from exc
    text_ids = ids[len(start) :]
    piece = length - len(start)
    # Sequences of one length need no padding, which would count as text.
    count = min(SEQUENCES, len(text_ids) // piece)
    if count < 1:
        raise UsageError(
            "the calibration text is too short",
            got=f"{len(ids)} tokens",
            expected=f"{length} or more",
        )
    pieces = torch.tensor(text_ids[: count * piece]).reshape(count, piece)
    return torch.cat([torch.tensor(start).expand(count, -1), pieces], 1) if start else pieces


def begins_with_start(folder: Path) -> bool:
    """Returns whether the tokenizer of a folder, if there is one, begins texts with a token.

    A model that was trained so has seen no text without it, and many behave badly there.
    """
    try:
        tokenizer = read_tokenizer(folder)
        ids = [int(token) for token in encoded(tokenizer, "")["input_ids"]]
        return bool(start_of(tokenizer, ids))
    # Calibration on the model's own text needs no tokenizer; those of transformers raise any error.
    except Exception:
        return False


def record(kind: str, tokens: torch.Tensor) -> Calibration:
    """Returns the manifest's record of a text, int64 [sequences, length]."""
    data = np.ascontiguousarray(tokens.numpy().astype("<i8")).tobytes()
    return Calibration(
        kind=kind,
        tokens=tokens.numel(),
        seed=SEED if kind in ("self", "random") else None,
        sha256=sha256_hex(data),
    )


def _start_token(config: Any) -> int:
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        # Some configs list several end tokens.
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < text.vocab_size:
            return value
    return 0


def _longest(model: Any) -> int:
    """Returns how many tokens the model can see at once.

    Position tables of some encoders have two entries that no token uses.
    """
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30) - 2
