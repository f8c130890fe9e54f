"""Record in a container the report that transformers gives of a plain load of its source."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError, machine_error
from codecllm.formats.files import as_path
from codecllm.formats.manifest.manifest import CONFIG_NAME, LOAD_REPORT_NAME, ORIGINAL_KEY
from codecllm.verifier.side_file import attach


def record_load_report(out: str | Path, *, block_dropped: bool = False) -> str | None:
    """Adds `load_report.json` to a container whose source has other weights than its class.

    transformers loads the names, shapes and dtypes of the source's tensors into the class that the
    config names, without weights. A container whose tensors are exactly those of the class gets no
    report. Neither does one whose model would be at random for the greater part, or lacks weights
    although its config named a quantization that no tensor showed: a load of it is refused.

    Args:
        out: a whole container, finished or staged.
        block_dropped: whether the source's config had such a quantization block.

    Returns:
        One line for people: the weights that are left over, or why transformers cannot load the
        model; None where nothing is left over.

    Raises:
        FormatError: the container is damaged.
        OSError, MemoryError: reading or writing failed.
    """
    folder = as_path(out, "out")
    with Container(folder) as container:
        manifest = container.manifest
        if manifest.file(CONFIG_NAME) is None:
            return None
        from codecllm.loader.config_size import check_config_size
        from codecllm.loader.hf.folder import describe, read_config
        from codecllm.loader.hf.model_class import described_tensors, model_class, rehearsed
        from codecllm.loader.load_report import draws_most, pack_report

        try:
            config = read_config(container)
            block = getattr(config, "quantization_config", None) or {}
            # The block may stand in a part of the config.
            if manifest.source.quantization is not None or ORIGINAL_KEY in block:
                return None  # only its own quantizer knows the names of its tensors
            check_config_size(config.to_dict(), len(container.records))
            cls = model_class(config, partial(described_tensors, container))
            model, report = rehearsed(cls, config, described_tensors(container))
            is_random = draws_most(model, report.missing) or (block_dropped and report.missing)
        except CodecLLMError as exc:
            return f"transformers cannot load this model: {exc}"
        except Exception as exc:
            machine = machine_error(exc)
            if machine is not None:
                raise machine from exc
            # A model class raises any type for another class's config.
            return f"transformers cannot load this model: {describe(exc)}"
    if report.is_empty:
        return None
    if is_random:
        return (
            "transformers would draw weights at random that the source ought to have, so that a "
            f"load is refused {report.summary()}"
        )
    attach(folder, manifest, LOAD_REPORT_NAME, pack_report(report))
    return (
        f"transformers leaves weights over {report.summary()} (recorded: a load warns of the same)"
    )
