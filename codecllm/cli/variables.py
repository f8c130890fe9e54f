"""Variables of the environment that a library obeys, and refuses, when it is imported.

torch alone reads some 300. Their errors do not name them: `invalid literal for int()`.
"""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterator
from types import FrameType, TracebackType

from codecllm.formats.errors import UnsupportedEnvironmentError, one_line


def refused_variable(exc: BaseException | None) -> UnsupportedEnvironmentError | None:
    """Returns the error for a variable that the import of a library refuses.

    Args:
        exc: what came out of the import, or what a library made of it.

    Returns:
        The error, or None where no library was being imported, or none of the variables that are
        set stands in the code that failed.
    """
    while exc is not None:
        for frame, first, last in reversed(list(_frames_of_import(exc.__traceback__))):
            name = _variable_in(frame, first, last, str(exc))
            if name is not None:
                return UnsupportedEnvironmentError(
                    f"{name} of the environment is refused when a library is imported: "
                    f"{type(exc).__name__}: {one_line(exc)}"
                )
        exc = exc.__cause__ or exc.__context__
    return None


def _frames_of_import(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int, int]]:
    """Yields frame, first and last line of each step of a library's import, to the failure."""
    is_import = False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        library = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
        # Python takes the frames of its own part in an import out of most tracebacks.
        is_import |= code.co_name == "<module>" and library not in ("codecllm", "__main__")
        if is_import:
            first, last, *_ = list(code.co_positions())[traceback.tb_lasti // 2]
            yield traceback.tb_frame, first or traceback.tb_lineno, last or traceback.tb_lineno
        traceback = traceback.tb_next


def _variable_in(frame: FrameType, first: int, last: int, message: str) -> str | None:
    """Returns a variable that is set, and that the lines of a frame, or its function, read.

    Code of a module reads many: there it is one whose value is in the message, too.
    """
    code = frame.f_code
    known = [*code.co_consts, *(frame.f_globals.get(name) for name in code.co_names)]
    named = [text for text in known if isinstance(text, str) and text in os.environ]
    lines = "".join(linecache.getline(code.co_filename, at) for at in range(first, last + 1))
    for name in named:
        if f'"{name}"' in lines or f"'{name}'" in lines:
            return name
    for name in named:
        if code.co_name != "<module>" or (os.environ[name] and os.environ[name] in message):
            return name
    return None
