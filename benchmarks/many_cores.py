"""One run on a machine with many cores: build, bits, speed a core, and scaling of convert and load.

    python -m benchmarks.many_cores --out FOLDER

Under six minutes on 16 cores. The native core is taken as it is in the tree
(`codecllm/_native.abi3.so`) or built. Rows and a plot go to FOLDER; the table is printed as it
grows.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import native_core, scaling
from codecllm.formats.codecs import native
from codecllm.formats.machine import cores

ROOT = Path(__file__).parent.parent
RAM_DISK = Path("/dev/shm")
LEAST_FREE = 24 << 30


def build() -> None:
    """Builds the native core in the tree where it is missing, and starts this program again."""
    if native.core is not None or "--built" in sys.argv:
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(process.stdout[-500:], process.stderr[-2000:])
    arguments = [sys.executable, "-m", "benchmarks.many_cores", *sys.argv[1:], "--built"]
    raise SystemExit(subprocess.run(arguments, cwd=ROOT, check=False).returncode)


def check_bits() -> None:
    """Runs the tests that compare every set of kernels with numpy, or the doctor."""
    tests = ["tests/unit/formats/test_rans.py", "tests/unit/formats/test_native.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if "No module named" in process.stdout + process.stderr:
        command = [sys.executable, "-m", "codecllm", "doctor"]
        process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(process.stdout[-1500:], process.stderr[-1500:])
    if process.returncode:
        raise SystemExit("bits are wrong")


def main() -> None:
    """Does everything."""
    build()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and plot")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{cores()} cores, native core: {native.describe()}", flush=True)
    check_bits()
    if native.core is not None:
        best = native.core.in_use()
        native_core.main()
        native.core.use(best)
    arguments = [f"--hidden={options.hidden}", f"--layers={options.layers}"]
    arguments += [f"--repeat={options.repeat}", f"--json={options.out / 'scaling.json'}"]
    try:
        import matplotlib  # noqa: F401

        arguments.append(f"--plot={options.out / 'scaling.svg'}")
    except ImportError:
        print("no plot: matplotlib is not installed")
    if RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > LEAST_FREE:
        arguments.append(f"--scratch={RAM_DISK}")
    scaling.main(arguments)


if __name__ == "__main__":
    main()
