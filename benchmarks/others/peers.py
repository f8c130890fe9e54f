"""Other tools' forms of the same weights: made once per run, loaded by the tools' own code.

Both are optional (`pip install zipnn bigsmall`). Each loader ends where ours does: in a
transformers model on the CPU.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def make_zipnn(source: Path, out: Path) -> int:
    """Compresses every tensor with ZipNN's defaults into one safetensors file; returns its size."""
    from zipnn import ZipNN

    out.mkdir(parents=True, exist_ok=True)
    packed_tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        with contextlib.redirect_stdout(io.StringIO()):
            data = ZipNN(input_format="torch", threads=os.cpu_count() or 1).compress(tensor)
        packed_tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    save_file(packed_tensors, out / "model.safetensors")
    return (out / "model.safetensors").stat().st_size


def load_zipnn(folder: Path) -> dict[str, Any]:
    """Returns the state dict of `make_zipnn`'s file."""
    from zipnn import ZipNN

    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        state[name] = ZipNN(input_format="torch", threads=os.cpu_count() or 1).decompress(
            bytearray(tensor.numpy())
        )
    return state


def make_bigsmall(source: Path, out: Path) -> int:
    """Compresses a model with BigSmall's defaults; returns the bytes of its file."""
    import bigsmall

    out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bigsmall.compress(source / "model.safetensors", out / "model.bs")
    return (out / "model.bs").stat().st_size


def load_bigsmall(folder: Path) -> dict[str, Any]:
    """Returns the state dict of `make_bigsmall`'s folder."""
    import bigsmall

    state: dict[str, Any] = bigsmall.from_pretrained(folder / "model.bs", show_progress=False)
    return state


MAKERS: dict[str, Callable[[Path, Path], int]] = {"zipnn": make_zipnn, "bigsmall": make_bigsmall}
LOADERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zipnn": load_zipnn,
    "bigsmall": load_bigsmall,
}


def installed() -> list[str]:
    """Returns the names of the tools that are here."""
    return [name for name in MAKERS if find_spec(name) is not None]
