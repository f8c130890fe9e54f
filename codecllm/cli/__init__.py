"""The command line: a failure is one clear line and the exit code of the error's class.

Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported version or environment, 4 files or
network, 5 unsafe.
"""

# The order of these imports is the order of the commands in --help.
from codecllm.cli import converting, checking, reading  # noqa: F401, I001
from codecllm.cli.process import main

__all__ = ["main"]
