"""Code that lies in a container's folder: when it runs, and the checks before.

A container may list Python files (feature `code`). transformers imports those that the config's
`auto_map` names, and only where the caller of a load says `trust_remote_code=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import transformers

from codecllm.formats.container import Container
from codecllm.formats.errors import UnsafePathError, UnsupportedEnvironmentError
from codecllm.formats.manifest.manifest import CODE_SUFFIX
from codecllm.hub import no_requests

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
"""Auto classes for which a config may name code; the first that it names is the usual one."""

_REFERENCE = re.compile(r"\w[\w-]*(/\w[\w-]*)*\.\w+")


def check_code(container: Container, auto_map: dict[str, Any] | None) -> None:
    """Compares every Python file of a container with the manifest, before anything of it may run.

    Args:
        container: the container.
        auto_map: where its config says which classes are code.

    Raises:
        UnsafePathError: the folder holds a Python file that the manifest does not list, or the
            config names code of another repository or folder.
        FormatError: a listed file is missing or differs.
    """
    listed_code = {
        record.name: record
        for record in container.manifest.files
        if record.name.endswith(CODE_SUFFIX)
    }
    for value in (auto_map or {}).values():
        # transformers fetches `repository--module.Class` from the Hub and runs it.
        if "--" in str(value):
            raise UnsafePathError(
                "the config names code of another repository, which no manifest lists",
                file="config.json",
                got=ascii(value)[:80],
            )
        for reference in value if isinstance(value, list) else [value]:
            if reference is not None and not _REFERENCE.fullmatch(str(reference)):
                raise UnsafePathError(
                    "the config names code by what is no module of the folder and a class",
                    file="config.json",
                    got=ascii(reference)[:80],
                )
    # All files, and not only those of `auto_map`: a listed module may import any of them.
    for path in sorted(container.folder.rglob(f"*{CODE_SUFFIX}")):
        name = path.relative_to(container.folder).as_posix()
        if name not in listed_code:
            raise UnsafePathError("the manifest does not list this code", file=name)
    for record in listed_code.values():
        container.read_side_file(record)


def forget_code_of_parts(attributes: Mapping[str, Any]) -> None:
    """Removes `auto_map` from every part of a config: transformers would ask whether it may run.

    `trust_remote_code` answers for the whole config alone. A part has no folder, and can name code
    of another repository only, which no manifest lists.

    Args:
        attributes: the JSON object of a config.json, or `vars` of a config; it is changed.
    """
    seen, rest = {id(attributes)}, [*attributes.values()]
    while rest:
        value = rest.pop()
        part = vars(value) if isinstance(value, transformers.PreTrainedConfig) else value
        if isinstance(part, (dict, list)) and id(part) not in seen:
            seen.add(id(part))
            if isinstance(part, dict):
                part.pop("auto_map", None)
            rest += part.values() if isinstance(part, dict) else part


def building(run_code: bool = False) -> AbstractContextManager[None]:
    """A block in which transformers builds a model of local files, and asks no Hub.

    Code of the model may ask for what it needs, and so may transformers where the package kernels
    is there: it fetches kernels of repositories that transformers, or the caller, names.

    Args:
        run_code: whether code of the model may run.
    """
    if run_code or find_spec("kernels") is not None:
        return nullcontext()
    return no_requests("this model's class")


def code_class(config: Any) -> Any:
    """Returns the Auto class through which transformers loads the config's own code, or None.

    It is the one for which `auto_map` names a class of `architectures`, else the usual one.
    """
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, dict):
        return None
    names = set(getattr(config, "architectures", None) or [])
    fitting = [key for key, value in auto_map.items() if str(value).rpartition(".")[2] in names]
    for key in (*fitting, *_AUTO_CLASSES):
        if key in auto_map and hasattr(transformers, key) and key.startswith("AutoModel"):
            return getattr(transformers, key)
    return None


def explain_missing_code(
    container: Container, auto_map: dict[str, Any] | None, error: UnsupportedEnvironmentError
) -> UnsupportedEnvironmentError:
    """Returns the error of a config that needs code of its repository, with advice."""
    if not auto_map:
        return error
    code = [one.name for one in container.manifest.files if one.name.endswith(CODE_SUFFIX)]
    first = next(iter(auto_map.values()))
    advice = (
        f"the container lists {len(code)} Python files of it: "
        "pass trust_remote_code=True to run them"
        if code
        else "the container holds none of it: convert the source with --with-code"
    )
    return UnsupportedEnvironmentError(
        f"this model needs code of its repository (auto_map: {first}); {advice}", file="config.json"
    )
