"""Runs one target under atheris: `python -m tests.fuzz.run TARGET [libFuzzer's options]`.

atheris is not among the requirements of the project; `make fuzz-python` puts it into an environment
of its own. New inputs go to build/fuzz-python/TARGET, or to the folder that `CODECLLM_FUZZ_INPUTS`
names, so that several processes can search side by side; one that fails to the working directory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["codecllm"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzzes until an option says to stop."""
    name, options = sys.argv[1], sys.argv[2:]
    inputs = Path(os.environ.get("CODECLLM_FUZZ_INPUTS") or Path("build") / "fuzz-python" / name)
    inputs.mkdir(parents=True, exist_ok=True)
    corpus = Path(__file__).parent / "corpus" / name
    with atheris.instrument_imports(include=["codecllm"]):
        TARGETS[name](b"")  # its imports and first files are not part of an execution's time
    atheris.Setup([sys.argv[0], *options, str(inputs), str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
