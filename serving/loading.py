"""What engines' model loaders share: our options, where a container lies, what is refused."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tqdm.auto import tqdm

from codecllm.formats.arguments.check import check_arguments, choice
from codecllm.formats.errors import UsageError
from codecllm.formats.files import as_path
from codecllm.formats.manifest.manifest import ORIGINAL_KEY

if TYPE_CHECKING:
    from codecllm.formats.container import Container
    from codecllm.serving.checkpoint import Checkpoint

NAME = "codecllm"
"""Of the quantization method in config.json, of plug-ins and of vLLM's load format."""

RESIDENT = ("dense", "int8", "packed")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Our keys of `--model-loader-extra-config`.

    Attributes:
        resident: `dense`: weights in the model's dtype. `int8`: codes and scales of int8 tensors
            stay, 8 bits a weight. `packed`: codes stay with 2 to 8 bits a weight, bfloat16 weights
            of lossless tensors with 12.
        workers: decoding threads of each rank; None takes one per core.
        manifest_sha256: accept only the container with this manifest (64 hex digits).
    """

    resident: str = "dense"
    workers: int | None = None
    manifest_sha256: str | None = None


class MethodFacts:
    """The answers of codecllm's quantization method that are the same in every engine."""

    @classmethod
    def get_name(cls) -> str:
        """Returns the name of the method."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the dtypes of activations: all that models are served in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least capability of a GPU: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no file: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the config for a block of config.json, which says nothing that layers need."""
        del config
        return cls()


def split_options(extra: Any) -> tuple[LoadOptions, Any]:
    """Returns our options and the rest of an engine's extra config.

    Raises:
        UsageError: one of ours has a wrong type or value.
    """
    if not isinstance(extra, dict):
        return LoadOptions(), extra
    names = {field.name for field in fields(LoadOptions)}
    options = LoadOptions(**{key: value for key, value in extra.items() if key in names})
    choice(RESIDENT)(options.resident, "resident")
    check_arguments(workers=options.workers, manifest_sha256=options.manifest_sha256)
    return options, {key: value for key, value in extra.items() if key not in names}


def find_folder(
    model: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Path:
    """Returns the folder of a container, fetched where `model` names a Hub repository.

    Raises:
        UsageError, HubError, FormatError: as `codecllm.hub.resolve`.
    """
    from codecllm.hub import resolve

    folder = as_path(model, "model")
    # With a revision, too: offline an engine puts the cache's folder in place of a name.
    if folder.exists():
        return folder
    return resolve(model, revision=revision, token=token, cache_dir=cache_dir, kind="model").folder


def refuse_original(block: Mapping[str, Any] | None, engine: str) -> None:
    """Refuses weights in another library's quantization.

    Args:
        block: `quantization_config` of config.json.
        engine: its name, for the message.

    Raises:
        UsageError: the container holds such weights.
    """
    original = (block or {}).get(ORIGINAL_KEY)
    if original is not None:
        raise UsageError(
            f"{engine} cannot take weights in another library's quantization from a container: "
            "`codecllm export` writes the checkpoint that it reads",
            got=original.get("quant_method"),
        )


def check_side_files(container: Container) -> None:
    """Compares the listed side files that are here (configs, tokenizer) with their sha256.

    Raises:
        FormatError: one of them differs.
    """
    for record in container.manifest.files:
        # Of a Hub repository an engine has fetched what it reads.
        if (container.folder / record.name).exists():
            container.check_file(record)


def shown_tensors(
    container: Container, checkpoint: Checkpoint, *, quiet: bool
) -> Generator[tuple[str, torch.Tensor]]:
    """Yields names and tensors of a checkpoint, behind a progress bar.

    Args:
        container: that of the checkpoint.
        checkpoint: see `Checkpoint.tensors`.
        quiet: show no bar.
    """
    bar = tqdm(
        total=len(container.records),
        desc="Loading codecllm container",
        unit=" tensors",
        disable=quiet,
    )
    with closing(checkpoint.tensors()) as tensors, bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(name in container.records)
