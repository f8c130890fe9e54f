"""Which files of a folder are the model: found as transformers finds them, in its order.

| order | file | remark |
|---|---|---|
| 1 | the config's `transformers_weights` | a safetensors file or an index |
| 2 | `model.safetensors` | also beside an index, which is then left over |
| 3 | `model.safetensors.index.json` | its files; the headers count, not the index |
| 4 | the only other set of safetensors files | a variant, or another library's file |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecllm.converter.source.files import read_json, stays_inside
from codecllm.formats.errors import (
    FormatError,
    SchemaError,
    SourceError,
    TruncatedError,
    UnsafePathError,
    UnsafeSourceError,
)
from codecllm.formats.manifest.manifest import INDEX_NAME
from codecllm.hub.kinds import INDEX_BYTES, file_kind

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAMES = frozenset({ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin"})
_NUMBERED = re.compile(r"(.*?)-?\d{5}-of-\d{5}(.*)\.safetensors")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The weight files of a model.

    Attributes:
        files: their names, in the order in which transformers reads them.
        index: name of the index that lists them, or None.
        tensor_files: tensor -> file, as the index says; empty without one.
        notes: sentences for the user.
    """

    files: tuple[str, ...]
    index: str | None
    tensor_files: Mapping[str, str]
    notes: tuple[str, ...] = ()


def find_weights(folder: Path, config: Mapping[str, Any] | None) -> WeightSet:
    """Returns the weight files that transformers would load.

    Raises:
        SourceError: there are none, or several sets of which none has the name that transformers
            looks for, or parts of tensors, as each rank of a distributed training writes its own.
        UnsafeSourceError: there are only pickles.
        TruncatedError: a file that the index names is missing.
        FormatError: the index is malformed, or names a file outside the folder.
    """
    for name in _safetensors_names(folder):
        # transformers reads all of these, and any other file beside them, before it looks further.
        if _DISTRIBUTED.fullmatch(name):
            raise SourceError(
                "a distributed checkpoint, whose files hold parts of tensors: save the model whole",
                file=name,
            )
    explicit = (config or {}).get("transformers_weights")
    if isinstance(explicit, str):
        return _explicit(folder, explicit)
    # Before the index, as in transformers: a folder may hold both.
    if (folder / SINGLE_NAME).is_file():
        return WeightSet((SINGLE_NAME,), None, {})
    if (folder / INDEX_NAME).is_file():
        return _indexed(folder, INDEX_NAME)
    # An adapter is a safetensors file too, and would be taken for the only other set.
    _refuse_adapter(folder)
    return _other_set(folder)


def _explicit(folder: Path, name: str) -> WeightSet:
    if not stays_inside(name):
        raise UnsafePathError(
            "transformers_weights names an unsafe file", file="config.json", got=ascii(name)[:80]
        )
    if name.endswith(".safetensors.index.json"):
        return _indexed(folder, name)
    if not name.endswith(".safetensors"):
        raise SourceError(
            "transformers_weights names no safetensors file or index",
            file="config.json",
            got=ascii(name)[:80],
        )
    return WeightSet((name,), None, {}, (f"config.json names {name} as the weights",))


def _indexed(folder: Path, index: str, notes: tuple[str, ...] = ()) -> WeightSet:
    tensor_files = _read_index(folder, index)
    names = sorted(set(tensor_files.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = sorted(set(_safetensors_names(folder)) - set(names))
        advice = ""
        if others and len(missing) == len(names):
            advice = (
                f"; the folder holds {', '.join(others[:3])} instead: "
                "the index belongs to other files"
            )
        raise TruncatedError(
            f"file is missing: {index} names it, and {len(names) - 1} others{advice}",
            file=missing[0],
        )
    return WeightSet(tuple(names), index, tensor_files, notes)


def _read_index(folder: Path, index: str) -> dict[str, str]:
    document = read_json(folder, index, INDEX_BYTES, as_python=False)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SchemaError("weight_map is not an object of file names", file=index)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise SchemaError("weight_map is not an object of file names", file=index)
    for name in set(weight_map.values()):
        if not stays_inside(name) or not name.endswith(".safetensors"):
            raise UnsafePathError(
                "weight_map names an unsafe file", file=index, got=ascii(name)[:80]
            )
    return weight_map


def _other_set(folder: Path) -> WeightSet:
    """Takes a set of another name where the folder holds only one."""
    names = [name for name in _safetensors_names(folder) if name not in ADAPTER_NAMES]
    indexes = sorted(
        path.name
        for path in folder.iterdir()
        if file_kind(path.name) == "index" and ".safetensors.index" in path.name
    )
    sets = {_set_name(name) for name in names}
    # With several sets any choice could be the wrong model, so the user has to decide.
    if len(sets) == 1 and len(indexes) == 1:
        return _indexed(folder, indexes[0], (_other_name_note(indexes[0]),))
    if len(names) == 1:
        return WeightSet((names[0],), None, {}, (_other_name_note(names[0]),))
    if names:
        raise SourceError(
            f"several safetensors files, but no {SINGLE_NAME} and no {INDEX_NAME}: "
            "rename the one to convert",
            file=str(folder),
            got=", ".join(names[:5]),
        )
    raise _nothing_found(folder)


def _other_name_note(name: str) -> str:
    return (
        f"the weights are {name}: transformers would not look for them under this name by default"
    )


def _set_name(name: str) -> str:
    """Returns the name of a set of files: the part that the names of its files share.

    `model-00001-of-00002.fp16.safetensors` -> `model.fp16`.
    """
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return name.removesuffix(".safetensors")
    return match[1] + match[2]


def _safetensors_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".safetensors"))


def _nothing_found(folder: Path) -> SourceError:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if file_kind(name) == "pickle"]
    if pickles:
        return UnsafeSourceError(
            "weights are pickles, which run code when they are opened; "
            "convert them to safetensors in a sandbox first",
            file=pickles[0],
        )
    others = [name for name in names if file_kind(name) == "weights"]
    if others:
        return SourceError("weights are not safetensors files", file=others[0])
    return SourceError("folder holds no safetensors files", file=str(folder))


def _refuse_adapter(folder: Path) -> None:
    """Raises SourceError where the folder holds an adapter of PEFT and no model."""
    if not any((folder / name).is_file() for name in ADAPTER_NAMES):
        return
    base, kind = describe_adapter(folder)
    raise SourceError(
        f"this is an adapter ({kind}) of {base}, not a model; merge it first: "
        "load the base and the adapter with PEFT, "
        "call merge_and_unload(), save the result with save_pretrained() and convert that folder",
        file=str(folder),
    )


def describe_adapter(folder: Path) -> tuple[str, str]:
    """Returns the name of an adapter's base model and its kind, for a sentence."""
    try:
        config = read_json(folder, ADAPTER_CONFIG)
        base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    except (FormatError, AttributeError):
        # Only for a sentence: a malformed config must not hide the error that follows.
        base = kind = None
    return repr(base) if base else "an unnamed base model", str(kind or "of PEFT")
