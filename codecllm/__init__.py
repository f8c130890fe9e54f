"""codecllm: model weights in an open, entropy-coded container with the same bits on any machine.

    import codecllm
    codecllm.convert("HuggingFaceTB/SmolLM2-135M-Instruct", "out/")
    codecllm.verify("out/")
    codecllm.diagnose("out/", "HuggingFaceTB/SmolLM2-135M-Instruct")
    model = codecllm.from_pretrained("out/")

Importing this module is light: torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codecllm.formats import FORMAT_VERSION
from codecllm.formats import WRITER_VERSION as __version__

# For type checkers, which do not run `__getattr__`.
if TYPE_CHECKING:
    from codecllm.api import convert as convert
    from codecllm.api import export as export
    from codecllm.loader import from_pretrained as from_pretrained
    from codecllm.publishing import push as push
    from codecllm.verifier import verify as verify
    from codecllm.verifier.diagnosis import diagnose as diagnose
    from codecllm.verifier.model_comparison import compare_models as compare_models

__all__ = [
    "FORMAT_VERSION",
    "__version__",
    "compare_models",
    "convert",
    "diagnose",
    "export",
    "from_pretrained",
    "push",
    "verify",
]

# Imported at first use (PEP 562): `import codecllm` must not import torch.
_HOMES = {
    "compare_models": "codecllm.verifier.model_comparison",
    "convert": "codecllm.api",
    "diagnose": "codecllm.verifier.diagnosis",
    "export": "codecllm.api",
    "from_pretrained": "codecllm.loader",
    "push": "codecllm.publishing",
    "verify": "codecllm.verifier",
}


def __getattr__(name: str) -> Any:
    """Imports a public function where it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'codecllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
