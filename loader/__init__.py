"""From a container to a torch model: streams of tensors, engines, residencies, transformers.

Importing this package registers the format with transformers: from then on
`AutoModel.from_pretrained` and its kin load containers by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codecllm.loader.hf.quantizer import register

if TYPE_CHECKING:
    from codecllm.loader.pretrained import from_pretrained
    from codecllm.loader.stream import stream_tensors

__all__ = ["from_pretrained", "stream_tensors"]

_HOMES = {
    "from_pretrained": "codecllm.loader.pretrained",
    "stream_tensors": "codecllm.loader.stream",
}


register()


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    # `import codecllm.loader` is enough for the Auto classes; it need not import all engines.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
