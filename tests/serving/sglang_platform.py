"""A CPU as a platform of SGLang, by its interface for platforms outside of its tree.

SGLang's own platform for CPUs needs kernels that no package on the index has. Without them each
layer has a forward method in plain torch, which is what SGLang takes for a platform of another
vendor. `tests.serving.sglang_environment` registers this one.
"""

from __future__ import annotations

import os

import torch
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform


class PlainCpu(SRTPlatform):
    """A CPU without kernels of SGLang's."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        """Returns the attention in plain torch."""
        return "torch_native"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Returns bytes of memory."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """Returns bytes that are free, and all."""
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return free, self.get_device_total_memory()

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Returns 0: SGLang asks for a log alone."""
        return 0.0


def activate() -> str:
    """Names the class."""
    return f"{__name__}:PlainCpu"
