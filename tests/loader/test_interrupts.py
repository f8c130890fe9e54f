"""Ctrl-C at any moment of a load lets no thread wait, and the next load of the process is whole.

SIGALRM stands for SIGINT: its handler raises KeyboardInterrupt at random moments, anywhere in the
main thread. A wait that never ends is found by faulthandler, which prints all stacks and exits.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from codecllm.converter import convert
from tests.sources import bf16, write_source

_LOADS = """
import faulthandler, random, signal, sys, time
from codecllm.formats.container import Container
from codecllm.loader.device.codecs import NOTHING
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.engine import Request
from codecllm.loader.host.engine import HostEngine
from tests.loader.device.host_streams import HostStreams

faulthandler.dump_traceback_later(200, exit=True)
kind, folder = sys.argv[1:]
rng, interrupted, armed = random.Random(7), 0, False

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def make(container):
    if kind == "device":
        return DeviceEngine(container, 2, HostStreams(), NOTHING)
    return HostEngine(container, rng.choice([1, 2, 4]), budget=rng.choice([1, 20_000, 1 << 30]))

signal.signal(signal.SIGALRM, interrupt)
with Container(folder) as container:
    requests = [Request(name) for name in container.records]
    expected, longest, seconds = None, 20.0, 0.0
    for turn in range(300):
        if turn == 8:  # as long as a load takes, with the first ones
            longest = seconds / 8
        begin = time.perf_counter()
        engine, tensors = None, []
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.random() * longest + 1e-5)
                engine = make(container)
                engine.prefetch(requests)
                for request in requests:
                    try:
                        tensors.append(engine.take(request).get())
                    except KeyboardInterrupt:  # as a caller that tries once more
                        interrupted += 1
                        tensors.append(engine.take(request).get())
            finally:
                armed = False
                seconds += time.perf_counter() - begin
                signal.setitimer(signal.ITIMER_REAL, 0)
                if engine is not None:
                    engine.close()
        except KeyboardInterrupt:
            interrupted += 1
            continue
        expected = expected or tensors
        assert all(map(lambda a, b: a.equal(b), tensors, expected))
print(interrupted, len(expected), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(5)
    # Small ones, which one job decodes together, and others.
    tensors = {
        f"l{n}": ("BF16", bf16(rng.standard_normal((700 if n % 3 == 2 else 40, 50 + n))))
        for n in range(12)
    }
    tensors["norm"] = ("F32", np.ones(63, np.float32))
    base = tmp_path_factory.mktemp("interrupts")
    source = write_source(base / "source", tensors, {"model_type": "none"})
    return convert(source, base / "container", include=("l1*",)).out


@pytest.mark.parametrize("kind", ["host", "device"])
def test_ctrl_c_at_any_moment_lets_no_thread_wait(folder, kind):
    command = [sys.executable, "-c", _LOADS, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    interrupted, tensors = map(int, done.stdout.split())
    assert interrupted > 30
    assert tensors == 13


_LEFT_OPEN = """
import sys
from codecllm.formats.container import Container
from codecllm.loader.device.codecs import NOTHING
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.engine import Request
from codecllm.loader.host.engine import HostEngine
from tests.loader.device.host_streams import HostStreams

container = Container(sys.argv[1])
requests = [Request(name) for name in container.records]
engines = [HostEngine(container, 2), DeviceEngine(container, 2, HostStreams(), NOTHING)]
for engine in engines:
    engine.prefetch(requests)
    print(engine.take(requests[0]).get().shape[0])
"""


def test_an_interpreter_ends_with_engines_that_were_not_closed(folder):
    command = [sys.executable, "-c", _LEFT_OPEN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["40", "40"], "")
