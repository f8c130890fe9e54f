"""llama.cpp's types of one model: with and without importance matrix, and with joined rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.others import llama_cpp, quantizers
from codecllm.verifier.evaluation.candidates import STORED_BITS_NAME

KINDS = {
    "Q8_0": ("Q8_0", False),
    "Q6_K": ("Q6_K", False),
    "Q5_K_M": ("Q5_K_M", False),
    "Q4_K_M": ("Q4_K_M", False),
    "Q5_K": ("Q5_K_S", True),
    "Q4_K": ("Q4_K_S", True),
    "IQ4_XS": ("IQ4_XS", False),
    "Q3_K": ("Q3_K_S", True),
    "Q2_K": ("Q2_K", True),
}
"""Name in the table -> llama-quantize's name, and whether all matrices get it (`--pure`)."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A file to make: its name, source, type, whether it is pure, and its importance matrix."""

    title: str
    source: Path
    kind: str
    pure: bool
    importance: Path | None


@dataclass(frozen=True, slots=True)
class GgufPeers:
    """All types of one model.

    Attributes:
        tool: llama.cpp's programs, with the GGUF file that gives vocabulary and settings.
        base: folder of the source, one safetensors file.
        out: where everything is made.
    """

    tool: llama_cpp.LlamaCpp
    base: Path
    out: Path

    def folders(self, calibration: Path, context: int, done: set[str]) -> Iterator[list[Path]]:
        """Makes de-quantized folders, some at a time, side by side in processes.

        Args:
            calibration: text for the importance matrix.
            context: tokens of its windows.
            done: names of folders that are not wanted.

        Yields:
            The next folders: `codecllm eval` takes them with the bits of the GGUF files. They are
            the caller's, to remove too.
        """
        tasks = [task for task in self._tasks() if task.title not in done]
        if not tasks:
            return
        self._prepare(calibration, context)
        jobs = max(1, min(8, (os.cpu_count() or 1) // 2))
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for first in range(0, len(tasks), jobs):
                some = {task: pool.submit(self._make, task) for task in tasks[first : first + jobs]}
                yield [future.result() for task, future in some.items() if _made(task, future)]

    def _tasks(self) -> list[_Task]:
        tasks = []
        for name, (kind, pure) in KINDS.items():
            for joined in ("", "-joined"):
                # Blocks of Q8_0 are of 32; the mixtures are judged as users get them.
                if joined and (name == "Q8_0" or name.endswith("_M")):
                    continue
                source = self.out / f"bf16{joined}.gguf"
                tasks.append(_Task(name + joined, source, kind, pure, None))
                if name != "Q8_0":  # it has no use for importance
                    matrix = self.out / f"importance{joined}.gguf"
                    tasks.append(_Task(f"{name}{joined}-imatrix", source, kind, pure, matrix))
        return tasks

    def _prepare(self, calibration: Path, context: int) -> None:
        plain, joined = self.out / "importance.gguf", self.out / "importance-joined.gguf"
        if joined.exists():
            return
        self.tool.write_model(self.base, self.out / "bf16.gguf")
        self.tool.write_model(self.base, self.out / "bf16-joined.gguf", joined=True)
        self.tool.importance(self.out / "bf16.gguf", calibration, plain, context)
        llama_cpp.join_importance(plain, joined)

    def _make(self, task: _Task) -> Path:
        folder = self.out / task.title
        if (folder / STORED_BITS_NAME).exists():
            return folder
        torch.set_num_threads(2)  # others work beside it
        file = self.out / f"{task.title}.gguf"
        self.tool.quantize(task.source, file, task.kind, pure=task.pure, importance=task.importance)
        matrices = llama_cpp.read_matrices(file, self.base)
        quantizers.write_dequantized(self.base, folder, matrices)
        print(task.title, llama_cpp.stored_types(file), flush=True)
        file.unlink()
        return folder


def _made(task: _Task, future: Future[Path]) -> bool:
    """Returns whether a file could be made; tells on stderr why not."""
    error = future.exception()
    if error is not None:
        print(f"{task.title}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return error is None
