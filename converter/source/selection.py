"""Which files go into the container beside the weights.

The rule: every plain file that is no weight, no code and not large.

transformers' tokenizers and processors alone ask for some sixty names, and other libraries for
more; a list of names would always lack some. The files that are left out are named, with the
reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from codecllm.converter.source.layout import ADAPTER_NAMES
from codecllm.converter.source.modules import Modules
from codecllm.formats import limits
from codecllm.formats.errors import LimitError, UnsafeSourceError
from codecllm.formats.files import is_safe_name
from codecllm.formats.manifest.manifest import (
    BASELINE_NAME,
    CODE_SUFFIX,
    CONFIG_NAME,
    INDEX_NAME,
    LOAD_REPORT_NAME,
    MANIFEST_NAME,
    fold_name,
)
from codecllm.hub.kinds import CARD_NAMES, FileKind, file_kind, is_weights

_Entry = TypeVar("_Entry")

MAX_COPIED_BYTES = 256 << 20
"""Largest file that is copied without being asked for by a module."""

# Leaves room for the files that a conversion and a baseline add.
MAX_COPIED_FILES = limits.FILES - 64
# A safe name has at most 8 parts (SPEC.md 3).
_MAX_DEPTH = 8
MAX_ENTRIES = 1 << 18
"""Most files and folders that are looked at; links may make few of them many."""

# Names of the container's root that a conversion or a baseline writes itself.
_OWN_NAMES = frozenset({CONFIG_NAME, INDEX_NAME, BASELINE_NAME, LOAD_REPORT_NAME, MANIFEST_NAME})
# Its shards, and what else stands in its root beside them: no folder can have these names.
_OWN_FILES = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|" + "|".join(map(re.escape, _OWN_NAMES)), re.IGNORECASE
)

# Of the model that transformers loads from the root of a container: nothing else may stand there.
_OF_ROOT_MODEL = re.compile(
    r"generation_config\.json|(tokenizer|vocab|merges|chat_template)\b.*|tokenizer_config\.json|"
    r"(special_tokens_map|added_tokens)\.json|.*processor_config\.json|"
    r".*\.(model|jinja|tiktoken|spm)",
    re.IGNORECASE,
)

_REASONS: dict[FileKind, str] = {
    "safetensors": "weights that the model does not load",
    "index": "index of weights that the model does not load",
    "pickle": "pickle",
    "weights": "weights in another format",
    "archive": "archive",
    "code": "code",
    "hidden": "hidden",
}


@dataclass(frozen=True, slots=True)
class LeftFile:
    """A file, or a folder whose name ends in `/`, that is not in the container, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class SideFiles:
    """The files that are copied, and those that are left.

    Attributes:
        copied: name in the container -> name in the repository.
        left: files and folders that are not in the container, in the order of names.
        linked: names of copied files that links outside the repository lead to.
    """

    copied: dict[str, str] = field(default_factory=dict)
    left: list[LeftFile] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)

    @property
    def code(self) -> list[str]:
        """Names of the Python files that were left."""
        return [
            one.name
            for one in self.left
            if one.reason == _REASONS["code"] and one.name.endswith(CODE_SUFFIX)
        ]


def select_side_files(
    repository: Path, modules: Modules, weights: Collection[str], with_code: bool
) -> SideFiles:
    """Decides on every file of a repository.

    Args:
        repository: the source's folder.
        modules: its modules.
        weights: names of the model's weight files and index, relative to the repository.
        with_code: whether Python files are copied.

    Raises:
        UnsafeSourceError: the weights of a module are a pickle.
        LimitError: those of a module are too large for a side file, or more than `MAX_ENTRIES`
            files and folders were looked at.
    """
    return _Selection(repository, modules, frozenset(weights), with_code).run()


class _Selection:
    """One walk over a repository."""

    def __init__(
        self, repository: Path, modules: Modules, weights: frozenset[str], with_code: bool
    ) -> None:
        self._repository = repository
        self._real_repository = os.path.realpath(repository)
        self._modules = modules
        self._weights = weights
        self._with_code = with_code
        self._result = SideFiles()
        self._folded: dict[str, str] = {}
        self._seen_entries = 0
        # Device and inode of the folders that are being walked through, outer ones first.
        self._ancestors: list[tuple[int, int]] = []

    def run(self) -> SideFiles:
        # The main module's files come first: where two would get the same name, its one is copied.
        if self._modules.main:
            self._walk(self._modules.main, 0)
        self._walk("", 0)
        self._result.left.sort(key=lambda one: one.name)
        self._result.copied = dict(sorted(self._result.copied.items()))
        return self._result

    def _walk(self, folder: str, depth: int) -> None:
        path = self._repository / folder
        self._ancestors.append(_identity(path))
        for inner in sorted(self._counted(path.iterdir())):
            name = f"{folder}/{inner.name}" if folder else inner.name
            if not inner.is_dir():
                self._decide(name, inner)
            elif name != self._modules.main:
                self._enter(name, inner, depth + 1)
        self._ancestors.pop()

    def _counted(self, entries: Iterable[_Entry]) -> Iterator[_Entry]:
        """Yields entries of folders, and stops where all together were too many."""
        for entry in entries:
            self._seen_entries += 1
            if self._seen_entries > MAX_ENTRIES:
                raise LimitError(
                    "too many files and folders, or links that show them many times: convert a "
                    "folder that holds the model alone",
                    file=str(self._repository),
                    expected=f"<= {MAX_ENTRIES}",
                )
            yield entry

    def _enter(self, name: str, path: Path, depth: int) -> None:
        # Hidden folders belong to tools, such as .git and .cache.
        if path.name.startswith("."):
            self._leave(f"{name}/", _REASONS["hidden"])
        elif depth > _MAX_DEPTH or not os.access(path, os.R_OK | os.X_OK):
            self._leave(f"{name}/", "too deep, or not readable")
        elif _identity(path) in self._ancestors:
            self._leave(f"{name}/", "link to a folder in which it stands")
        elif self._is_module(name) or self._leads_to_module(name):
            self._walk(name, depth)
        elif any(is_weights(file_kind(file)) for file in self._files_below(path)):
            # A second model, as in onnx/: its configs without its weights would mislead.
            self._leave(f"{name}/", "folder with weights of its own")
        else:
            self._walk(name, depth)

    def _files_below(self, folder: Path) -> Iterator[str]:
        for _, folders, files in os.walk(folder):
            # In place: os.walk then does not enter hidden folders.
            folders[:] = [name for name in self._counted(folders) if not name.startswith(".")]
            yield from self._counted(files)

    def _decide(self, name: str, path: Path) -> None:
        target = self._target(name)
        if name in self._weights or target in (CONFIG_NAME, MANIFEST_NAME):
            return
        reason = self._reason(name, target, path)
        if reason is not None:
            self._leave(name, reason)
            return
        self._folded[fold_name(target)] = target
        self._result.copied[target] = name
        real = os.path.realpath(path)
        if not real.startswith(self._real_repository + os.sep) and not _in_hub_cache(path):
            self._result.linked.append(target)

    def _reason(self, name: str, target: str, path: Path) -> str | None:
        """Returns why a file is not copied, or None."""
        if not path.is_file():
            return "no regular file, or a link that leads to none"
        if target in _OWN_NAMES - {INDEX_NAME}:
            return "the container has its own"
        if target in CARD_NAMES:
            return "describes the source's repository"
        if self._modules.main and name == target and _OF_ROOT_MODEL.fullmatch(name):
            return "would be read as a file of the main module"
        if Path(name).name in ADAPTER_NAMES:
            return "adapter: merge it into the model before converting to have it inside"
        kind = file_kind(name)
        size = path.stat().st_size
        if self._is_module(name.rpartition("/")[0]):
            if kind == "safetensors":
                return self._module_weights_reason(name, target, size)
            if kind == "index" and name.endswith(f"/{INDEX_NAME}"):  # of shards that are copied
                kind = "other"
        if kind == "pickle":
            self._refuse_pickled_module(name)
        is_wanted_code = self._with_code and name.endswith(CODE_SUFFIX)
        if kind != "other" and not is_wanted_code:
            return _REASONS[kind]
        if size > MAX_COPIED_BYTES:
            return f"larger than {MAX_COPIED_BYTES >> 20} MiB"
        return self._name_reason(target)

    def _module_weights_reason(self, name: str, target: str, size: int) -> str | None:
        if size > limits.SIDE_FILE_BYTES:
            raise LimitError(
                "weights of a module are too large to be copied",
                file=name,
                got=size,
                expected=f"<= {limits.SIDE_FILE_BYTES}",
            )
        reason = self._name_reason(target)
        if reason is not None:
            raise UnsafeSourceError(f"weights of a module cannot be copied: {reason}", file=name)
        return None

    def _name_reason(self, target: str) -> str | None:
        if not is_safe_name(target):
            return "its name does not mean the same file on every system"
        folder, separator, _ = target.partition("/")
        if separator and _OWN_FILES.fullmatch(folder):
            return "its folder has the name of a file of the container"
        twin = self._folded.get(fold_name(target))
        if twin == target:
            return "the main module's file of this name is copied"
        if twin is not None:
            return f"differs from {twin} only by case"
        if len(self._result.copied) >= MAX_COPIED_FILES:
            return f"more than {MAX_COPIED_FILES} files"
        return None

    def _refuse_pickled_module(self, name: str) -> None:
        """Raises UnsafeSourceError where a pickle holds the only weights of a module."""
        folder = name.rpartition("/")[0]
        if not self._is_module(folder) or folder == self._modules.main:
            return
        files = self._counted((self._repository / folder).iterdir())
        if not any(file_kind(file.name) == "safetensors" for file in files):
            raise UnsafeSourceError(
                "weights of a module are a pickle, which runs code when it is opened; "
                "convert it to safetensors in a sandbox first",
                file=name,
            )

    def _is_module(self, folder: str) -> bool:
        return any(
            folder == module or folder.startswith(f"{module}/") for module in self._modules.others
        )

    def _leads_to_module(self, folder: str) -> bool:
        module_folders = (*self._modules.others, self._modules.main)
        return any(module.startswith(f"{folder}/") for module in module_folders)

    def _target(self, name: str) -> str:
        main = self._modules.main
        return name.removeprefix(f"{main}/") if main else name

    def _leave(self, name: str, reason: str) -> None:
        self._result.left.append(LeftFile(name, reason))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _in_hub_cache(path: Path) -> bool:
    """Whether a link leads from a snapshot of the Hub's cache into its repository's blobs."""
    real = Path(os.path.realpath(path))
    folder = Path(os.path.realpath(path.parent))
    return any(
        parent.name == "snapshots" and real.parent == parent.parent / "blobs"
        for parent in folder.parents
    )
