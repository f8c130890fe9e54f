"""Options of the test run."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

_GPU_TESTS = Path(__file__).parent / "gpu"

hypothesis.settings.register_profile(
    "default", max_examples=200, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--update-golden` and `--gpu`."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden containers of a new format version",
    )
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run what can be run on the GPUs of this machine, there; without it they are hidden",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs unless `--gpu` is given: all other tests expect tensors and kernels on the CPU.

    torch asks for the devices, and Triton for its interpreter, once in a process.
    """
    _trace_bare_threads()
    if config.option.gpu:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: torch finds no GPU here")
    else:
        os.environ |= {
            "CUDA_VISIBLE_DEVICES": "",
            "HIP_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "1",
        }


def _trace_bare_threads() -> None:
    """Lets coverage, where it measures, see threads started past `threading`: the loader's are."""
    trace = threading.gettrace()
    if trace is None:
        return
    start = _thread.start_new_thread

    def start_traced(function: Callable[..., object], *arguments: Any) -> int:
        def traced(*args: Any, **kwargs: Any) -> None:
            sys.settrace(trace)
            function(*args, **kwargs)

        return start(traced, *arguments)

    _thread.start_new_thread = start_traced


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests/gpu without `--gpu`; with it leaves out all other tests not marked `gpu_too`."""
    kept, left_out = [], []
    for item in items:
        needs = _GPU_TESTS in item.path.parents
        if needs and not config.option.gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))
        runs = needs or not config.option.gpu or item.get_closest_marker("gpu_too") is not None
        (kept if runs else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
