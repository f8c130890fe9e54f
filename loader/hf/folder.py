"""Read config, tokenizer and generation settings of a model. Code of its folder is never run.

transformers can import Python files of a model folder (`auto_map`, `custom_generate`). Without an
explicit `trust_remote_code` it asks on the terminal and runs them after a "y". Every call of
codecllm goes through this module, which always answers no. Of a container it shows transformers the
listed files only (`listed.py`).

For a file that is damaged or made to be hostile, the many classes of transformers raise errors of
many types (KeyError, TypeError, RecursionError, ...). Here that is one error that names the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from codecllm.formats.errors import (
    SchemaError,
    UnsafePathError,
    UnsupportedEnvironmentError,
    machine_error,
    one_line,
    shown,
)
from codecllm.formats.manifest.manifest import CONFIG_NAME
from codecllm.hub import no_requests
from codecllm.loader.hf.listed import (
    ModelFiles,
    for_model,
    for_model_with_code,
    for_tokenizer,
    listed_files,
)
from codecllm.loader.hf.remote_code import forget_code_of_parts
from codecllm.loader.hf.side_limits import (
    check_config_file,
    check_generation_file,
    check_tokenizer_files,
    refuse_named_kernels,
    tokenizer_classes,
)

GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def read_config(
    model: ModelFiles, *, run_code: bool = False, config_class: Any = None, **options: Any
) -> Any:
    """Returns a model's config as a transformers `PretrainedConfig`.

    Args:
        model: its folder, or the opened container.
        run_code: whether code of the folder may run: only where the caller of a load said so, and
            after `remote_code.check_code`.
        config_class: class that reads the config, and takes from that of a model of several parts
            its own; None takes the one of the config's `model_type`.
        options: attributes to change, as `from_pretrained` takes them. With
            `return_unused_kwargs=True` the result is the config and the other options.

    Raises:
        UnsupportedEnvironmentError: this transformers cannot read it.
        ModelMismatchError: it asks for more modules or labels than any model has.
        UnsafePathError: it names attention or experts of a repository, which would be fetched and
            run, and `options` do not choose others.
        FormatError: a file of the container differs from the manifest, or the config is beyond a
            limit.
    """
    from transformers import AutoConfig

    with listed_files(model, for_model_with_code if run_code else for_model) as folder:
        check_config_file(folder)
        refuse_named_kernels(folder, options)
        try:
            reader = config_class or AutoConfig
            with nullcontext() if run_code else no_requests("the class of this config"):
                result = reader.from_pretrained(folder, trust_remote_code=run_code, **options)
        except UnsafePathError:
            raise
        except Exception as exc:
            raise machine_error(exc) or UnsupportedEnvironmentError(
                f"transformers cannot read the config: {describe(exc)}", file=CONFIG_NAME
            ) from exc
    forget_code_of_parts(vars(result[0] if isinstance(result, tuple) else result))
    return result


def read_tokenizer(model: ModelFiles) -> Any:
    """Returns the tokenizer of a model's folder or of an opened container.

    Raises:
        SchemaError: there is none, or transformers cannot read its files.
        ModelMismatchError: the config asks for more modules or labels than any model has.
        FormatError: a file of the container differs from the manifest, or asks for more tokens than
            any tokenizer has, or for files that are not checked.
    """
    with listed_files(model, for_tokenizer) as folder:
        check_config_file(folder)  # transformers reads it to find the tokenizer's class
        return _tokenizer_of(folder, check_tokenizer_files(folder))


def read_gguf_tokenizer(path: Path) -> Any:
    """Returns the tokenizer that a GGUF file describes.

    Raises:
        SchemaError: there is none, or transformers cannot read it.
    """
    with alone(path) as folder:
        return _tokenizer_of(folder, {"gguf_file": path.name})


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Yields a temporary folder with a link to a file, and nothing that lies beside the file.

    transformers would read adapters and settings there.
    """
    with tempfile.TemporaryDirectory(prefix="codecllm-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    """Returns what a tokenizer makes of a text.

    Args:
        tokenizer: of transformers.
        text: the text.
        options: of the tokenizer's call.

    Raises:
        SchemaError: its library panicked. Other errors are the tokenizer class's own.
    """
    with _panics_as_errors():
        return tokenizer(text, **options)


def decoded(tokenizer: Any, ids: Any) -> str:
    """Returns the text of tokens without special ones. Raises as `encoded`."""
    with _panics_as_errors():
        return str(tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raises SchemaError for a panic of a library in Rust, which is no Exception of Python."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        raise SchemaError(f"the tokenizer panics: {one_line(exc)}", file="tokenizer.json") from exc


def start_of(tokenizer: Any, ids: list[int]) -> list[int]:
    """Returns the start token with which a tokenizer began a text, or nothing.

    Args:
        tokenizer: of transformers.
        ids: what its call made of the text.
    """
    return ids[:1] if ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else []


def read_generation_config(model: ModelFiles) -> Any:
    """Returns a model's generation_config.json as a transformers `GenerationConfig`.

    Raises:
        SchemaError: transformers cannot read it.
        FormatError: a file of the container differs from the manifest.
    """
    from transformers import GenerationConfig

    with listed_files(model, for_model) as folder:
        check_generation_file(folder)
        try:
            with no_requests("the class of generation settings"):
                return GenerationConfig.from_pretrained(folder)
        except UnsafePathError:
            raise
        except Exception as exc:
            raise machine_error(exc) or SchemaError(
                f"transformers cannot read the generation defaults: {describe(exc)}",
                file=GENERATION_CONFIG_NAME,
            ) from exc


def describe(exc: BaseException) -> str:
    """Returns class and text of a foreign error, in one line."""
    return f"{type(exc).__name__}: {one_line(exc, 300)}"


def _tokenizer_of(folder: Path, options: Mapping[str, str | None]) -> Any:
    from transformers import AutoTokenizer

    _check_class(folder)
    try:
        # Never with code: a tokenizer is read for checks, for which no caller has allowed any.
        with _panics_as_errors(), no_requests("this tokenizer's class"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except UnsafePathError:
        raise
    except Exception as exc:
        name = _damaged_tokenizer_file(folder)
        raise machine_error(exc) or SchemaError(
            f"transformers cannot read the tokenizer: {describe(exc)}", file=name
        ) from exc
    return tokenizer


def _check_class(folder: Path) -> None:
    """Refuses a class that transformers would use as a tokenizer's, and which is of something else.

    A model, a processor, or the pair of tokenizers of a RAG model, which have no end-of-text token
    of their own, read files that nothing has looked at.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto import tokenization_auto as auto
    from transformers.utils import DummyObject

    for key, text in tokenizer_classes(folder):
        name = auto.TOKENIZER_MAPPING_NAMES.get(text) if key == "model_type" else text
        for one in {name, f"{name}Fast", str(name).removesuffix("Fast")} if name else ():
            try:
                cls = auto.tokenizer_class_from_name(one)
            except Exception:  # it cannot be imported, as transformers will say
                continue
            if cls is None or (isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerBase)):
                continue
            # Of a library that is missing: its use says so.
            if isinstance(cls, DummyObject):
                continue
            raise SchemaError(
                "the class is not that of one tokenizer",
                file="tokenizer_config.json" if key == "tokenizer_class" else CONFIG_NAME,
                got=shown(text),
            )


def _damaged_tokenizer_file(folder: Path) -> str | None:
    """Returns the tokenizer file that is no JSON object, else the first that exists, else None."""
    # transformers' message rarely names the file, and the user needs to know which one to mend.
    existing = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in existing:
        try:
            document = json.loads((folder / name).read_bytes())
        except (ValueError, RecursionError):
            return name
        if not isinstance(document, dict):
            return name
    return existing[0] if existing else None
