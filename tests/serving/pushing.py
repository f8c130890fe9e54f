"""A container on a Hub of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hub_server import HubServer
from tests.serving.engine import ROOT, variables

REPO = "user/tiny"
ONLINE = {"HF_HUB_OFFLINE": "0"}


def push(hub: HubServer, folder: Path, cache: Path) -> None:
    """Pushes a container to `REPO`."""
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "push", str(folder), REPO, "--level", "structure"],
        env=variables(cache, hub.environment(token="hf_writer", cache=str(cache)), **ONLINE),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
