"""`codecllm generate`: load a container and continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, SchemaError, UsageError, one_line
from codecllm.hub import resolve


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
        SchemaError: the container has no tokenizer, or none that transformers can read.
        ModelMismatchError: the tokenizer is not the model's.
        CodecLLMError: loading failed.
    """
    files = resolve(out, revision=revision)
    # Behind `resolve`: a wrong name fails before torch is imported, which takes seconds.
    import torch

    from codecllm.loader import from_pretrained
    from codecllm.loader.hf.folder import read_tokenizer

    with Container(files.folder) as container:
        for record in container.manifest.files:
            container.check_file(record)
        model = from_pretrained(files.folder, resident=resident, workers=workers, progress=progress)
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise UsageError(f"{type(model).__name__} does not generate text", file=str(out))
        tokenizer = read_tokenizer(container)
    try:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    except Exception as exc:  # tokenizer files make their classes fail in any way
        raise SchemaError(
            f"the tokenizer cannot encode the prompt: {type(exc).__name__}: {one_line(exc)}",
            file="tokenizer.json",
        ) from exc
    if inputs["input_ids"].shape[-1] == 0:
        raise UsageError("the prompt has no tokens", got=repr(prompt))
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
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
