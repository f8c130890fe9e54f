"""llama.cpp's quantizer: built once from source, run on GGUF files of a plain model, read back.

Models are those of a GGUF file that is given as a template: of the kinds `llama` and `qwen2`.

The source comes with the sdist of `llama-cpp-python`. Building takes cmake, a C++ compiler and
some ten minutes on two cores; it is kept in the cache of `demo.models`.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file

from demo.models import cache_folder

SDIST = "llama-cpp-python==0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SUPER_BLOCK = 256
"""Weights that share the outer scale of a K-quant."""

_CMAKE = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_OPENMP=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
]
_CMAKE += ["-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The two programs, and the GGUF file whose vocabulary and settings the new files get."""

    programs: Path
    template: Path

    def write_model(self, model: Path, out: Path, *, joined: bool = False) -> None:
        """Writes a plain model in bf16 as a GGUF file with the same bits.

        Args:
            model: Hugging Face folder, one safetensors file.
            out: the file to write.
            joined: makes one row of as many rows as a whole number of super-blocks takes. llama.cpp
                falls back to larger types where a row is no multiple of 256; joined, it quantizes
                to the type that was asked for. Such a file cannot run.
        """
        reader = GGUFReader(self.template)
        writer = GGUFWriter(out, arch=_kind(reader))
        skipped_fields = (
            "GGUF.",
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        )
        for name, field in reader.fields.items():
            if not name.startswith(skipped_fields):
                writer.add_key_value(
                    name,
                    field.contents(),
                    field.types[0],
                    field.types[-1] if len(field.types) > 1 else None,
                )
        heads = _heads(reader)
        for name, tensor in load_file(model / "model.safetensors").items():
            gguf_name = _gguf_name(name, reader)
            if tensor.ndim == 1:
                writer.add_tensor(gguf_name, tensor.float().numpy())
                continue
            rows = _permuted(tensor, heads.get(gguf_name.split(".")[-2]))
            columns = rows.shape[1] * (
                _together(rows.shape[1]) if joined and gguf_name.startswith("blk.") else 1
            )
            data = rows.contiguous().view(torch.uint8).numpy().reshape(-1, 2 * columns)
            writer.add_tensor(gguf_name, data, raw_dtype=GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def importance(self, model: Path, text: Path, out: Path, context: int) -> None:
        """Writes the importance matrix of a GGUF file on a text, in windows of `context` tokens."""
        self._run(
            "llama-imatrix",
            "-m",
            model,
            "-f",
            text,
            "-o",
            out,
            "-c",
            str(context),
            "--no-ppl",
            "-t",
            str(os.cpu_count() or 1),
        )

    def quantize(
        self,
        model: Path,
        out: Path,
        kind: str,
        *,
        pure: bool = False,
        importance: Path | None = None,
    ) -> None:
        """Quantizes the layers of a GGUF file; embedding and head stay in bf16."""
        options: list[str | Path] = ["--token-embedding-type", "bf16"]
        options += ["--output-tensor-type", "bf16"]
        options += ["--pure"] if pure else []
        options += ["--imatrix", importance] if importance is not None else []
        self._run("llama-quantize", *options, model, out, kind, "2")

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self.programs / program, *arguments]
        process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if process.returncode != 0:
            raise RuntimeError(
                f"{program}: {(process.stderr.strip().splitlines() or ['failed'])[-1]}"
            )
        if "did not find weights for" in process.stdout + process.stderr:
            raise RuntimeError(f"{program}: the importance matrix lacks a tensor")


def join_importance(source: Path, out: Path) -> None:
    """Writes the importance matrix of a file with joined rows: columns repeat for each row."""
    reader, writer = GGUFReader(source), GGUFWriter(out, arch="imatrix")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                name,
                field.contents(),
                field.types[0],
                field.types[-1] if len(field.types) > 1 else None,
            )
    for tensor in reader.tensors:
        times = _together(tensor.data.shape[-1]) if tensor.name.endswith(".in_sum2") else 1
        writer.add_tensor(tensor.name, np.tile(tensor.data, (1, times)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_matrices(path: Path, model: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """Returns the layers' matrices of a GGUF file of this module, by the plain model's names.

    Each as float32 in the plain model's order and shape, and the bits that it takes in the file
    with its description.
    """
    reader = GGUFReader(path)
    heads, tensors = _heads(reader), {tensor.name: tensor for tensor in reader.tensors}
    matrices = {}
    for name, plain in load_file(model / "model.safetensors").items():
        gguf_name = _gguf_name(name, reader)
        if plain.ndim == 1 or not gguf_name.startswith("blk."):
            continue
        tensor = tensors[gguf_name]
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        rows = _unpermuted(
            torch.from_numpy(values.copy()).reshape(plain.shape),
            heads.get(gguf_name.split(".")[-2]),
        )
        description_bytes = (
            sum(part.nbytes for part in tensor.field.parts)
            + -int(tensor.n_bytes) % reader.alignment
        )
        matrices[name] = (rows, 8 * (int(tensor.n_bytes) + description_bytes))
    return matrices


def stored_types(path: Path) -> dict[str, int]:
    """Returns how many of the layers' matrices of a GGUF file are stored in which type."""
    types = [
        tensor.tensor_type.name
        for tensor in GGUFReader(path).tensors
        if len(tensor.shape) > 1 and "blk." in tensor.name
    ]
    return {name: types.count(name) for name in sorted(set(types))}


def build() -> Path:
    """Returns the folder of llama-quantize and llama-imatrix; builds them on the first call.

    Raises:
        RuntimeError: the source cannot be fetched, is not the one that was expected, or does not
            build.
    """
    folder = cache_folder() / "llama.cpp" / SDIST_SHA256[:16]
    programs = folder / "bin"
    if (programs / "llama-quantize").exists() and (programs / "llama-imatrix").exists():
        return programs
    with tempfile.TemporaryDirectory(prefix="codecllm-") as temporary:
        with tarfile.open(_fetch(Path(temporary))) as archive:
            archive.extractall(temporary, filter="data")
        source = next(Path(temporary).glob("*/vendor/llama.cpp"))
        print("building llama.cpp ...", file=sys.stderr, flush=True)
        _checked("cmake", "-S", str(source), "-B", str(folder), *_CMAKE)
        _checked(
            "cmake", "--build", str(folder), "-j2", "--target", "llama-quantize", "llama-imatrix"
        )
    return programs


def _fetch(folder: Path) -> Path:
    options = ["--quiet", "--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
    _checked(sys.executable, "-m", "pip", "download", *options, SDIST)
    sdist = next(folder.glob("*.tar.gz"))
    with open(sdist, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SDIST_SHA256:
        raise RuntimeError(f"{sdist.name}: sha256 {got}, expected {SDIST_SHA256}")
    return sdist


def _checked(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]}: {(process.stderr or process.stdout).strip()[-2000:]}")


def _together(columns: int) -> int:
    return SUPER_BLOCK // math.gcd(SUPER_BLOCK, columns)


def _gguf_name(name: str, reader: GGUFReader) -> str:
    kind = _kind(reader)
    layers = int(reader.fields[f"{kind}.block_count"].contents())
    architecture = next(known for known, title in MODEL_ARCH_NAMES.items() if title == kind)
    gguf_name = get_tensor_name_map(architecture, layers).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    if gguf_name is None:
        raise RuntimeError(f"{name} has no name in a GGUF file")
    return str(gguf_name)


def _kind(reader: GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _heads(reader: GGUFReader) -> dict[str, int]:
    """Returns the heads of projections whose rows GGUF reorders: rotary pairs side by side.

    It does so for Llama alone.
    """
    if _kind(reader) != "llama":
        return {}
    keys = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    return {name: int(reader.fields[key].contents()) for name, key in keys.items()}


def _permuted(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    return (
        rows
        if heads is None
        else rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    )


def _unpermuted(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    return (
        rows
        if heads is None
        else rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    )
