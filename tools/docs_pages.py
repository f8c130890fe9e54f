"""Hook of mkdocs: shows top-level files of the repository as pages, with rewritten links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "security.md",
    "SPEC.md": "spec.md",
    "conformance/README.md": "conformance.md",
}
"""File of the repository -> page of the site."""

_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the text of the repository's file for such a page, or the page's own text."""
    source = _SOURCES.get(page.file.src_uri)
    if source is None:
        return markdown
    text = (ROOT / source).read_text(encoding="utf-8")
    folder = Path(source).parent
    return _LINK.sub(lambda link: _target(folder, link.group(1)), text)


def _target(folder: Path, link: str) -> str:
    """Returns where a link of a file in `folder` leads on the site."""
    path = (folder / link.rstrip("/")).as_posix()
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return PAGES.get(path) or path.removeprefix("docs/")
