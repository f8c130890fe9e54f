"""`codecllm generate`: load a container and continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from codecllm.formats.arguments.check import MAX_COUNT, check_arguments, choice, flag, integer
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    LimitError,
    ModelMismatchError,
    SchemaError,
    UsageError,
    foreign_errors_as,
    one_line,
)
from codecllm.hub import resolve

_OWN_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""What a greedy continuation takes from a model's generation defaults, and nothing else."""

_TOKENS_PER_BYTE, _MORE_TOKENS = 16, 4096
"""Tokens of a prompt; compatibility forms of Unicode come to 11 bytes for one byte."""

_MOST_ENDS = 256  # a few models end a text at dozens of tokens


def generate(
    out: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 32,
    resident: Literal["auto", "dense", "int8", "compressed"] = "auto",
    revision: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> str:
    """Returns the prompt and its greedy continuation as text.

    Of the model's generation defaults only the ids of its first and last tokens hold: beams,
    penalties and the like belong to a caller who asks for them.

    Args:
        out: container folder or Hub id.
        prompt: text to continue.
        max_new_tokens: how many tokens at most.
        resident: how the weights stay in memory; see `codecllm.from_pretrained`.
        revision: for a Hub id.
        workers: decoding threads.
        progress: whether loading draws a bar on stderr.

    Raises:
        UsageError: the model does not generate text, or the prompt has no tokens.
        SchemaError: the container has no tokenizer, or none that transformers can read; a token id
            of the generation defaults is none.
        LimitError: it makes far more tokens of the prompt than that has bytes.
        ModelMismatchError: the tokenizer is not the model's, or the model fails to continue.
        CodecLLMError: loading failed.
    """
    check_arguments(prompt=prompt, workers=workers)
    max_new_tokens = integer(1, MAX_COUNT)(max_new_tokens, "max_new_tokens")
    choice(("auto", "dense", "int8", "compressed"))(resident, "resident")
    flag(progress, "progress")
    files = resolve(out, revision=revision)
    # Behind `resolve`: a wrong name fails before torch is imported, which takes seconds.
    import torch

    from codecllm.loader import from_pretrained
    from codecllm.loader.hf.folder import decoded, encoded, read_tokenizer

    with Container(files.folder) as container:
        for record in container.manifest.files:
            container.check_file(record)
        model = from_pretrained(files.folder, resident=resident, workers=workers, progress=progress)
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise UsageError(f"{type(model).__name__} does not generate text", file=str(out))
        tokenizer = read_tokenizer(container)
    try:
        inputs = encoded(tokenizer, prompt, return_tensors="pt", return_token_type_ids=False)
    except Exception as exc:  # tokenizer files make their classes fail in any way
        raise SchemaError(
            f"the tokenizer cannot encode the prompt: {type(exc).__name__}: {one_line(exc)}",
            file="tokenizer.json",
        ) from exc
    count = inputs["input_ids"].shape[-1]
    if count == 0:
        raise UsageError("the prompt has no tokens", got=repr(prompt))
    most = _TOKENS_PER_BYTE * len(prompt.encode()) + _MORE_TOKENS
    if count > most:
        raise LimitError(
            "the tokenizer makes too many tokens of the prompt",
            file="tokenizer.json",
            got=count,
            expected=f"at most {most}",
        )
    largest = int(inputs["input_ids"].max())
    # On a GPU an index beyond the embedding fails without a message that names it.
    rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", largest + 1)
    if largest >= rows:
        raise ModelMismatchError(
            "the tokenizer gives tokens beyond the model's vocabulary",
            file="tokenizer.json",
            got=largest,
            expected=f"below {rows}",
        )
    plain = _greedy(model.generation_config, tokenizer, rows, max_new_tokens)
    # `generate` fills unset values of its argument from the model's own config: both are replaced.
    model.generation_config = plain
    # Models fail in any way, such as at a start token they lack.
    with (
        foreign_errors_as(
            ModelMismatchError, "the model cannot continue the prompt", file="config.json"
        ),
        torch.inference_mode(),
    ):
        tokens = model.generate(**inputs, generation_config=plain)
    return decoded(tokenizer, tokens[0])


def _greedy(own: Any, tokenizer: Any, rows: int, max_new_tokens: int) -> Any:
    """Returns settings of a greedy continuation with the token ids of a model's own settings.

    Raises:
        SchemaError: an id is no number of 32 bits, or forces a token that the model does not have.
    """
    from transformers import GenerationConfig

    ids = {key: getattr(own, key, None) for key in _OWN_TOKENS}
    for key, value in ids.items():
        several = value if isinstance(value, list) else [value]
        fine = len(several) <= _MOST_ENDS and all(
            token is None or (type(token) is int and abs(token) < 2**31) for token in several
        )
        # A forced token is an index of the scores; others are compared only, or embedded.
        if fine and key.startswith("forced_"):
            fine = all(token is None or 0 <= token < rows for token in several)
        if not fine:
            raise SchemaError(
                f"{key} is no token id",
                file="generation_config.json",
                got=repr(value)[:80],
                expected=f"one below {rows}",
            )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        **ids,
    )
