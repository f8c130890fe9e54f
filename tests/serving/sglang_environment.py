"""Makes the environment for tests of SGLang: `python -m tests.serving.sglang_environment FOLDER`.

SGLang's package asks for CUDA's compilers and kernels, of which a CPU can use none. So it is
installed without its requirements, and of these what its engine imports on a CPU (7 GB: torch is
a build for CUDA, which torchvision needs).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.5.23"
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
REQUIRED = (
    "aiohttp",
    "anthropic",
    "apache-tvm-ffi==0.1.11",
    "blobfile==3.0.0",
    "compressed-tensors==0.18.0",
    "datasets",
    "distro",
    "easydict",
    "einops",
    "fastapi",
    "gguf",
    "interegular",
    "ipython",
    "kernels>=0.14.1,<0.15",
    "llguidance>=1.7.6,<2",
    "mistral-common>=1.11.5",
    "msgspec",
    "numba==0.65.1",
    "nvidia-ml-py",
    "openai==2.8.0",
    "openai-harmony==0.0.4",
    "orjson",
    "outlines==0.1.11",
    "partial-json-parser",
    "pillow",
    "prometheus-client",
    "psutil",
    "pybase64",
    "python-multipart",
    "pyzmq",
    "requests",
    "scipy",
    "sentencepiece==0.2.1",
    "setproctitle",
    "soundfile==0.13.1",
    "tiktoken",
    "tokenizers==0.23.2",
    "transformers==5.19.0",
    "uvicorn",
    "uvloop",
    "watchfiles",
    "xgrammar==0.2.7",
)
TESTS = ("pytest>=8.4", "pytest-timeout>=2.4", "hypothesis>=6.130", f"{ROOT}[gguf]")

PLATFORM = "[sglang.srt.platforms]\nplain_cpu = tests.serving.sglang_platform:activate\n"


def main(folder: Path) -> None:
    """Makes the environment, or completes one that was begun."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *TORCH], check=True)
    subprocess.run([*install, "--no-deps", f"sglang=={VERSION}"], check=True)
    subprocess.run([*install, *REQUIRED, *TESTS], check=True)
    packages = next((folder / "lib").glob("python3*")) / "site-packages"
    about = packages / "codecllm_plain_cpu-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: codecllm-plain-cpu\nVersion: 0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(PLATFORM, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
