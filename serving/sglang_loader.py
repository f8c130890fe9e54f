"""SGLang's model loader for containers: SGLang builds the model, a container fills it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, UsageError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.serving import sglang_names
from codecllm.serving.checkpoint import Checkpoint
from codecllm.serving.loading import (
    NAME,
    check_side_files,
    find_folder,
    refuse_original,
    shown_tensors,
    split_options,
)
from codecllm.serving.sglang_names import DefaultModelLoader, LoadConfig
from codecllm.serving.unfilled import mark_unfilled, refuse_unfilled

_LOG = logging.getLogger(__name__)


class CodecLLMLoader(DefaultModelLoader):
    """Fills SGLang's models with the decoded weights of containers."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Takes our options out of the extra config; see `LoadOptions`.

        Raises:
            UsageError: one of them has a wrong type, or asks for codes in memory.
        """
        self.options, others = split_options(load_config.model_loader_extra_config)
        if self.options.resident != "dense":
            raise UsageError(
                "SGLang serves decoded weights alone",
                got=repr(self.options.resident),
                expected="resident 'dense'",
            )
        super().__init__(sglang_names.with_extra_config(load_config, others))
        self._device = torch.device("cpu")
        self._primary: str | None = None
        self._sha256: str | None = self.options.manifest_sha256
        self._checkpoint: Checkpoint | None = None
        self._is_draft = False

    def download_model(self, model_config: Any) -> None:
        """Fetches the container's files where `model_config` names a Hub repository."""
        self._open(model_config.model_path, model_config.revision).close()

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Builds the model as SGLang builds that of the source, and fills it.

        Raises:
            FormatError: the container is damaged or is none; no model is returned.
            ModelMismatchError: a parameter got no weights, or a tensor was not asked for.
            UsageError: the container holds weights in another library's quantization.
        """
        refuse_original(getattr(model_config.hf_config, "quantization_config", None), "SGLang")
        begin = time.perf_counter()
        self._primary = model_config.model_path
        self._is_draft = bool(model_config.is_draft_model)
        self._device = torch.device(device_config.device)
        with self._open(model_config.model_path, model_config.revision) as container:
            check_side_files(container)
            # Once opened, it must stay the same one.
            self._sha256 = container.manifest_sha256
        _LOG.info("Opened the container in %.2f seconds", time.perf_counter() - begin)
        with _as_source(model_config):
            model: torch.nn.Module = super().load_model(
                model_config=model_config, device_config=device_config
            )
        return model

    def load_weights_and_postprocess(
        self,
        model: torch.nn.Module,
        weights: Iterable[tuple[str, torch.Tensor]],
        target_device: torch.device,
    ) -> None:
        """Fills a model that was built, then lets SGLang lay its weights out.

        SGLang's models ignore names that they do not know, and parameters that never came. Here
        both are errors, but for parameters that a draft model shares with its target.

        Raises:
            ModelMismatchError: a parameter got no weights, or a tensor was not asked for.
        """
        if self._primary is None:
            # Weights are exchanged in a model that runs, perhaps some of them only.
            super().load_weights_and_postprocess(model, weights, target_device)
            return
        marks = mark_unfilled(model)
        self.load_weights_only(model, weights, target_device)
        assert self._checkpoint is not None
        self._checkpoint.check_complete()
        untouched = refuse_unfilled(model, marks)
        if untouched and not self._is_draft:
            raise ModelMismatchError(
                "the parameter got no weights from the container", tensor=untouched[0]
            )
        self.postprocess_weights(model, target_device)

    def _get_weights_iterator(
        self, source: Any, **named: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of a source under the names of its checkpoint."""
        if not self._is_container(source):
            yield from super()._get_weights_iterator(source, **named)
            return
        self.counter_before_loading_weights = time.perf_counter()
        with self._open(source.model_or_path, source.revision) as container:
            self._checkpoint = Checkpoint(
                container,
                dtype=source.model_config.dtype,
                workers=self.options.workers,
                device=self._device,
            )
            quiet = not sglang_names.is_first_rank()
            with closing(shown_tensors(container, self._checkpoint, quiet=quiet)) as tensors:
                yield from sglang_names.renamed(self, source, tensors)

    def _is_container(self, source: Any) -> bool:
        """Whether a source of weights is a container: a model may have further ones."""
        folder = Path(source.model_or_path)
        if folder.exists():
            return (folder / MANIFEST_NAME).exists()
        return bool(source.model_or_path == self._primary)

    def _open(self, model: str, revision: str | None) -> Container:
        folder = find_folder(model, revision=revision, cache_dir=self.load_config.download_dir)
        return Container(folder, expected_manifest_sha256=self._sha256)


@contextmanager
def _as_source(model_config: Any) -> Iterator[None]:
    """Lets SGLang build the model as that of the source: without a quantization config."""
    model_config.quantization = None
    try:
        yield
    finally:
        model_config.quantization = NAME
