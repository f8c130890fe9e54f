"""Whether the tokenizers of source and container make the same tokens of the same texts."""

from __future__ import annotations

from pathlib import Path

from codecllm.converter.source.files import SourceFile
from codecllm.formats.checksums import sha256_of_descriptor
from codecllm.formats.errors import FormatError, ModelMismatchError
from codecllm.verifier.baseline import model_output as output
from codecllm.verifier.baseline.prompts import PROMPTS
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.model.sample_text import SAMPLE_TEXT
from codecllm.verifier.report import Stage

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def check_tokenizers(
    source: output.PromptCoder,
    container: output.PromptCoder,
    folders: tuple[Path, Path],
    stage: Stage,
) -> None:
    """Compares the tokens of the same texts from the tokenizers of source and container."""
    # Several scripts, code and numbers: a wrong merge or normalizer shows on one of them.
    texts = [*PROMPTS, SAMPLE_TEXT]
    for text in texts:
        theirs = source.encode(text)
        ours = container.encode(text)
        if theirs == ours and source.decode(theirs) == container.decode(theirs):
            continue
        if bool(theirs) != bool(ours):
            which = "container" if theirs else "source"
            raise_text = f"the {which} has no usable tokenizer, the other one has"
        elif theirs == ours:
            texts_of_tokens = (
                f"{container.decode(theirs)[:40]!r} for {source.decode(theirs)[:40]!r}"
            )
            raise_text = f"the same tokens are another text: {texts_of_tokens}"
        else:
            place = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
                min(len(theirs), len(ours)),
            )
            raise_text = f"{text[:30]!r} becomes other tokens from token {place} on"
            error = ModelMismatchError(
                raise_text, got=ours[place : place + 4], expected=theirs[place : place + 4]
            )
            stage.fail(error.located(file=_other_file(folders)), cause=Cause.WRONG_TOKENIZER)
            return
        stage.fail(
            ModelMismatchError(raise_text, file=_other_file(folders)), cause=Cause.WRONG_TOKENIZER
        )
        return


def _other_file(folders: tuple[Path, Path]) -> str | None:
    """Returns the first tokenizer file that differs between two folders."""
    for name in _TOKENIZER_FILES:
        digests = [_digest_of(folder, name) for folder in folders]
        if digests[0] != digests[1]:
            return name
    return None


def _digest_of(folder: Path, name: str) -> str | None:
    """Returns the sha256 of a regular file; None of anything else."""
    try:
        with SourceFile(folder, name) as file:
            return sha256_of_descriptor(file.descriptor)[0]
    except FormatError:
        return None
