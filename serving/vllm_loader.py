"""vLLM's model loader for containers: vLLM builds the model, a container fills it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from codecllm.formats.errors import ModelMismatchError, UsageError
from codecllm.serving import vllm_names
from codecllm.serving.loading import (
    NAME,
    check_side_files,
    find_folder,
    refuse_original,
    shown_tensors,
    split_options,
)
from codecllm.serving.unfilled import mark_unfilled, refuse_unfilled
from codecllm.serving.vllm_config import Building, building
from codecllm.serving.vllm_names import DefaultModelLoader, LoadConfig, ModelConfig

if TYPE_CHECKING:
    from codecllm.formats.container import Container
    from codecllm.serving.checkpoint import Checkpoint
    from codecllm.serving.codes_plan import CodesPlan

# vLLM shows the log of names below its own.
_LOG = vllm_names.init_logger(f"vllm.{NAME}")


class CodecLLMLoader(DefaultModelLoader):
    """Fills vLLM's models from containers, and loads any other model as vLLM does."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Takes our options out of the extra config; see `LoadOptions`.

        Raises:
            UsageError: one of them has a wrong type.
        """
        self.options, others = split_options(load_config.model_loader_extra_config)
        # vLLM's class knows its own load formats only.
        super().__init__(
            vllm_names.replace(
                load_config,
                load_format="auto",
                model_loader_extra_config=others,
            )
        )
        self._device = torch.device("cpu")
        self._building: Building | None = None
        self._sha256: str | None = None
        self._checkpoint: Checkpoint | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetches the container's files where `model_config` names a Hub repository."""
        if not _is_container(model_config):
            super().download_model(model_config)
        else:
            self._folder(model_config)

    def load_model(self, vllm_config: Any, model_config: ModelConfig, prefix: str = "") -> Any:
        """Builds the model as vLLM builds that of the source, and fills it.

        Raises:
            FormatError: the container is damaged or is none; no model is returned.
            ModelMismatchError: a parameter got no weights, or a tensor was not asked for.
            UsageError: the options do not fit the container.
        """
        if not _is_container(model_config):
            return super().load_model(vllm_config, model_config, prefix)
        _refuse_other_quantization(vllm_config, model_config)
        begin = time.perf_counter()
        with self._open(model_config) as container:
            check_side_files(container)
            self._sha256 = sha256 = container.manifest_sha256
            plan = self._plan(container)
        _LOG.info("Opened the container in %.2f seconds", time.perf_counter() - begin)
        vllm_names.add_hash_factor(vllm_config, NAME, f"{self.options.resident}:{sha256}")
        self._device = torch.device(self.load_config.device or vllm_config.device_config.device)
        if plan is None:
            # Without a config vLLM takes each of its branches as for the source.
            vllm_config.quant_config = None
        with building(plan) as self._building:
            return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fills a model that was built; errors as `load_model`."""
        if not _is_container(model_config):
            super().load_weights(model, model_config)
            return
        # vLLM would not miss a parameter, or a part of a fused one, that never came.
        self.enable_weights_track = True
        marks = mark_unfilled(model)
        with _told(model) as names:
            super().load_weights(model, model_config)
        assert self._checkpoint is not None
        self._checkpoint.check_complete()
        untouched = refuse_unfilled(model, marks)
        if untouched and names == [None]:
            # A model that does not tell what it has loaded: vLLM has not looked.
            raise ModelMismatchError(
                "the parameter got no weights from the container", tensor=untouched[0]
            )
        if self._building is not None and self._building.plan is not None:
            from codecllm.serving.vllm_codes import check_filled

            check_filled(self._building.layers)
            _LOG.info("%d layers keep their codes or are packed", len(self._building.layers))

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor]]:
        """Yields the container's tensors under the names of the source's checkpoint."""
        if not _is_container(model_config):
            yield from super().get_all_weights(model_config, model)
            return
        from codecllm.serving.checkpoint import Checkpoint

        self.counter_before_loading_weights = time.perf_counter()
        with self._open(model_config) as container:
            self._checkpoint = Checkpoint(
                container,
                dtype=model_config.dtype,
                workers=self.options.workers,
                device=self._device,
                skips=lambda name: vllm_names.is_elsewhere(self, name),
                as_codes=self._as_codes(),
            )
            quiet = not vllm_names.enable_tqdm(self.load_config.use_tqdm_on_load)
            with closing(shown_tensors(container, self._checkpoint, quiet=quiet)) as tensors:
                yield from tensors
        yield from vllm_names.secondary_weights(self, model)

    def _plan(self, container: Container) -> CodesPlan | None:
        if self.options.resident == "dense":
            return None
        from codecllm.serving.codes_plan import CodesPlan

        return CodesPlan(container, packs=self.options.resident == "packed")

    def _as_codes(self) -> Callable[[str], bool]:
        """Returns which names are handed over as codes.

        Raises:
            UsageError: weights are to be loaded again, by a loader that has built no model.
        """
        if self.options.resident == "dense":
            return lambda name: False
        if self._building is None or self._building.plan is None:
            raise UsageError(
                f"resident {self.options.resident!r} cannot load weights again: "
                "start the engine anew"
            )
        return self._building.plan.names.__contains__

    def _open(self, model_config: ModelConfig) -> Container:
        from codecllm.formats.container import Container

        # Once opened, it must stay the same one.
        expected = self.options.manifest_sha256 or self._sha256
        return Container(self._folder(model_config), expected_manifest_sha256=expected)

    def _folder(self, model_config: ModelConfig) -> Path:
        return find_folder(
            model_config.model,
            revision=model_config.revision,
            token=model_config.hf_token,
            cache_dir=self.load_config.download_dir,
        )


def _is_container(model_config: ModelConfig) -> bool:
    return bool(model_config.quantization == NAME)


@contextmanager
def _told(model: Any) -> Iterator[list[Any]]:
    """Yields a list that gets what the model's `load_weights` returns: names, or None."""
    results: list[Any] = []
    load = model.load_weights

    def load_weights(weights: Any) -> Any:
        results.append(load(weights))
        return results[-1]

    model.load_weights = load_weights
    try:
        yield results
    finally:
        del model.load_weights


def _refuse_other_quantization(vllm_config: Any, model_config: ModelConfig) -> None:
    """Refuses weights in another library's quantization, and vLLM's own on top of ours.

    Raises:
        UsageError: the container holds such weights, or `--quantization-config` was given.
    """
    refuse_original(getattr(model_config.hf_config, "quantization_config", None), "vLLM")
    # The config of a draft model may be that of its target, which has none any more.
    if getattr(vllm_config.quant_config, "online_quantization_config", None) is not None:
        raise UsageError(
            "--quantization-config does not go with a codecllm container: `codecllm export` writes "
            "a plain checkpoint that vLLM can quantize"
        )
