"""Read config, tokenizer and generation settings of a folder. Code that lies in the folder is never run.

transformers can import Python files of a model folder (`auto_map`, `custom_generate`). Without an explicit
`trust_remote_code` it asks on the terminal and runs them after a "y". Every call of codecllm goes through this module,
which always answers no.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_config(folder: str | Path) -> Any:
    """Returns the config of a folder as a transformers `PretrainedConfig`."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(folder: str | Path, **options: Any) -> Any:
    """Returns the tokenizer of a folder; `options` go to `AutoTokenizer.from_pretrained`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def read_generation_config(folder: str | Path) -> Any:
    """Returns the folder's generation_config.json as a transformers `GenerationConfig`."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder)
