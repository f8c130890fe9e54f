"""What the machine at hand can give."""

from __future__ import annotations

import os


def available_memory() -> int:
    """Returns the bytes of memory that can be allocated without swapping; a large number where that is unknown."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
