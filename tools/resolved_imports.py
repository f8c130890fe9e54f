"""Checks that pyright, and with it editors, resolves every import of the project's own modules.

Run as `python -m tools.resolved_imports`, in an environment with basedpyright (`make lint` installs
it; its wheel brings the node binary that it needs).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.source_files import PACKAGE_FOLDERS, TEST_FOLDERS, TOOL_FOLDERS

ROOT = Path(__file__).resolve().parents[1]
OTHERS = (*TOOL_FOLDERS, *TEST_FOLDERS)
_UNRESOLVED = re.compile(r'Import "([\w.]+)" could not be resolved')


def main() -> int:
    """Prints every unresolved import of ours; returns the exit code."""
    report = run_pyright(ROOT)
    file_count = report["summary"]["filesAnalyzed"]
    faults = own_unresolved(report["generalDiagnostics"])
    for line in faults:
        print(line)
    print(f"{len(faults)} unresolved imports of ours in {file_count} files")
    return 1 if faults or not file_count else 0


def run_pyright(root: Path) -> dict[str, Any]:
    """Runs basedpyright on the modules below `root`, looking at imports alone; returns its report.

    Raises:
        RuntimeError: it wrote no report.
    """
    settings = {
        "include": [str(root / name) for name in (*PACKAGE_FOLDERS, *OTHERS)],
        "extraPaths": [str(root)],
        "typeCheckingMode": "off",
        "reportMissingImports": "error",
        "pythonVersion": "3.11",
    }
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "pyrightconfig.json"
        project.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(project)]
        process = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(process.stdout)
    except ValueError:
        raise RuntimeError(f"basedpyright wrote no report: {process.stderr[-500:]}") from None
    return report


def own_unresolved(diagnostics: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each import of a module of ours that was not resolved.

    Examples:
        >>> place = {"file": "a.py", "range": {"start": {"line": 3}}}
        >>> own_unresolved([{"message": 'Import "codecllm.x" could not be resolved', **place}])
        ['a.py:4: codecllm.x']
        >>> own_unresolved([{"message": 'Import "zipnn" could not be resolved', **place}])
        []
    """
    lines = []
    for diagnostic in diagnostics:
        match = _UNRESOLVED.search(diagnostic["message"])
        if match is not None and match[1].partition(".")[0] in ("codecllm", *OTHERS):
            line = diagnostic["range"]["start"]["line"] + 1
            lines.append(f"{diagnostic['file']}:{line}: {match[1]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
