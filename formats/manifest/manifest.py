"""The manifest `codecllm.json`.

The content of the container, its origin, and the checksum of every byte (SPEC.md 8).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.codecs import rans
from codecllm.formats.dtypes import DTYPES, INT8_SOURCES
from codecllm.formats.errors import (
    LimitError,
    SchemaError,
    UnsafePathError,
)
from codecllm.formats.files import is_plain_name, is_safe_name
from codecllm.formats.manifest.records import (
    DEADZONE,
    FEEDBACK_DEADZONE,
    AliasTensor,
    Calibration,
    CodedTensor,
    FileRecord,
    Int8Tensor,
    Options,
    RawTensor,
    Record,
    ShardRecord,
    Source,
    StoredRecord,
    TensorRecord,
)
from codecllm.formats.shards.safetensors_header import check_name, check_shape, has_sound_dims
from codecllm.formats.shards.side_tensors import misplaced_side, side_names

MANIFEST_NAME = "codecllm.json"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
BASELINE_NAME = "baseline.json"
LOAD_REPORT_NAME = "load_report.json"
UNLISTED_NAMES = frozenset({"README.md", ".gitattributes"})
"""Files of a container's folder that are never listed or checked: the Hub rewrites them."""

SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
STEPS, COL_SCALE, WIDE = "steps", "col_scale", "wide"
"""Features of format 1.2.

Recorded rounding and rate options, scales for columns, codes in two planes.
"""

PATHS, CODE, QUANTIZED = "paths", "code", "quantized"
"""Features of format 1.3.

Side files of any safe name, files of Python code, weights in another library's quantization.
"""

CODE_SUFFIX = ".py"
"""End of the name of a side file that holds code."""

QUANT_METHOD = "codecllm"
"""Method of the quantization block of a container's config.json."""

ORIGINAL_KEY = "original_quantization_config"
"""Key of the config's block that keeps the block of another library's quantization.

See feature `quantized`.
"""

KNOWN_FEATURES: frozenset[str] = frozenset(
    {rans.NAME, STEPS, COL_SCALE, WIDE, PATHS, CODE, QUANTIZED}
)
"""Names that `required_features` may hold."""


class Manifest(Record):
    """The whole manifest but for its seal.

    Extra top-level keys are allowed only under an `x_` prefix, and ignored.
    """

    format: Literal["codecllm"]
    format_version: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$")]
    required_features: list[str]
    writer: dict[str, str]
    source: Source
    options: Options
    calibration: Calibration | None = None
    shards: Annotated[list[ShardRecord], Field(max_length=limits.SHARDS)]
    files: Annotated[list[FileRecord], Field(max_length=limits.FILES)]
    tensors: Annotated[list[TensorRecord], Field(max_length=limits.TENSORS)]

    @cached_property
    def stored_in(self) -> list[list[StoredRecord]]:
        """The records of the tensors that each shard holds, by its number."""
        by_shard: list[list[StoredRecord]] = [[] for _ in self.shards]
        for record in self.tensors:
            if not isinstance(record, AliasTensor):
                by_shard[record.shard].append(record)
        return by_shard

    @model_validator(mode="after")
    def _check_links(self) -> Manifest:
        _check_file_names(self)
        _check_features(self)
        _check_tensors(self)
        return self

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all tensors as their records describe them, aliases counted.

        More than the source's files hold where quantized weights were stored as the floats that
        they stand for.
        """
        return sum(record.source_bytes for record in self.tensors)

    def file(self, name: str) -> FileRecord | None:
        """Returns the record of a listed side file."""
        return next((record for record in self.files if record.name == name), None)


def pack_manifest(manifest: Manifest) -> bytes:
    """Returns the manifest's bytes.

    One line per record, sealed with the sha256 of all bytes before the seal's key.
    """
    document = manifest.model_dump(mode="json", exclude_none=False)
    parts = []
    for key, value in document.items():
        # Absent, because a reader refuses null here.
        if key == "calibration" and value is None:
            continue
        if key == "source" and value["quantization"] is None:
            value = {name: value[name] for name in value if name != "quantization"}
        if key in ("options", "calibration"):
            parts.append(f"{_dump(key)}:{_dump(_without_none(value))}")
        elif key in ("shards", "files", "tensors"):
            # One record a line: a diff of two manifests shows single tensors.
            body = ",\n".join(_dump(_without_none(item)) for item in value)
            parts.append(f"{_dump(key)}:[\n{body}\n]" if value else f"{_dump(key)}:[]")
        else:
            parts.append(f"{_dump(key)}:{_dump(value)}")
    text = ("{" + ",\n".join(parts) + ",\n").encode()
    data = text + f'"manifest_sha256":"{sha256_hex(text)}"}}\n'.encode()
    if len(data) > limits.MANIFEST_BYTES:
        raise LimitError(
            "manifest is too long",
            file=MANIFEST_NAME,
            got=len(data),
            expected=limits.MANIFEST_BYTES,
        )
    return data


def record_bytes(record: TensorRecord) -> int:
    """Returns the bytes of a tensor's record in a manifest, with the separator behind it."""
    return len(_dump(_without_none(record.model_dump(mode="json"))).encode()) + len(",\n")


def manifest_sha256(data: bytes) -> str:
    """Returns the sha256 of a whole manifest.

    The one value a user may pin to fix every byte of a container.
    """
    return sha256_hex(data)


def _check_file_names(manifest: Manifest) -> None:
    names = [record.name for record in (*manifest.shards, *manifest.files)]
    for name in names:
        if not is_safe_name(name):
            raise UnsafePathError("unsafe file name", file=MANIFEST_NAME, got=ascii(name)[:80])
    for number, shard in enumerate(manifest.shards, 1):
        expected = shard_name(number, len(manifest.shards))
        if shard.name != expected:
            raise SchemaError(
                "shard has a wrong name", file=MANIFEST_NAME, got=shard.name, expected=expected
            )
    # Some file systems take letters of either case for the same.
    reserved_names = {name.casefold() for name in (MANIFEST_NAME, *UNLISTED_NAMES)}
    folded_names = {fold_name(name) for name in names}
    # A file cannot have the name of another file's folder.
    folders = {
        "/".join(parts[:end]) for parts in map(_parts, folded_names) for end in range(1, len(parts))
    }
    if (
        len(folded_names) != len(names)
        or not reserved_names.isdisjoint(folded_names)
        or not folders.isdisjoint(folded_names)
    ):
        raise SchemaError("a file name stands twice or is reserved", file=MANIFEST_NAME)
    # Loaders that go by names would read it as weights.
    if any(SHARD_NAME.fullmatch(record.name) for record in manifest.files):
        raise SchemaError("a shard is listed as a side file", file=MANIFEST_NAME)


def fold_name(name: str) -> str:
    """Returns a form that two names share if some file systems take them for one.

    Letters of either case are alike.
    """
    return unicodedata.normalize("NFC", name.casefold())


def _parts(name: str) -> list[str]:
    return name.split("/")


def shard_name(number: int, count: int) -> str:
    """Returns the name of shard `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _check_features(manifest: Manifest) -> None:
    features = features_of(manifest.tensors, manifest.options, manifest.calibration)
    for name in features + source_features(
        [record.name for record in manifest.files], manifest.source.quantization
    ):
        if name not in manifest.required_features:
            raise SchemaError(
                f"feature {name!r} is used but not listed in required_features", file=MANIFEST_NAME
            )


def features_of(
    records: Iterable[TensorRecord], options: Options, calibration: Calibration | None
) -> list[str]:
    """Returns the features beyond format 1.0 that a reader must know, in a fixed order."""
    uses = {rans.NAME: False, STEPS: calibration is not None, COL_SCALE: False, WIDE: False}
    # Older readers refuse keys that they do not know: the feature tells them why.
    uses[STEPS] |= any(
        value is not None
        for value in (options.bits, options.ratio, options.calibrate, options.refine)
    )
    for record in records:
        if isinstance(record, CodedTensor):
            uses[rans.NAME] |= record.xxh3.tables is not None
        if isinstance(record, Int8Tensor):
            uses[STEPS] |= record.rounding is not None
            uses[COL_SCALE] |= record.xxh3.col_scale is not None
            uses[WIDE] |= record.wide
    return [name for name, use in uses.items() if use]


def source_features(file_names: Iterable[str], quantization: str | None) -> list[str]:
    """Returns the features of side files and the source's quantization, in a fixed order."""
    names = list(file_names)
    uses = {
        PATHS: not all(is_plain_name(name) for name in names),
        CODE: any(name.endswith(CODE_SUFFIX) for name in names),
        QUANTIZED: quantization is not None,
    }
    return [name for name, use in uses.items() if use]


def _check_tensors(manifest: Manifest) -> None:
    records = {record.name: record for record in manifest.tensors}
    # Two spellings of one name would be two tensors here and one tensor elsewhere.
    normal = {unicodedata.normalize("NFC", name) for name in records}
    if not len(records) == len(normal) == len(manifest.tensors):
        raise SchemaError("a tensor name stands twice", file=MANIFEST_NAME)
    sides = [name for record in manifest.tensors for name in side_names(record)]
    if len({*records, *sides}) != len(records) + len(sides):
        counts = Counter([*records, *sides])
        raise SchemaError(
            "name of a side tensor is also another tensor's",
            file=MANIFEST_NAME,
            tensor=next(name for name in sides if counts[name] > 1),
        )
    for record in manifest.tensors:
        # The rules of a shard's header: the tensor has to stand there under this name.
        check_name(record.name, MANIFEST_NAME)
        if not has_sound_dims(tuple(record.shape)):
            check_shape(record.shape, MANIFEST_NAME, record.name)
        where: dict[str, Any] = {"file": MANIFEST_NAME, "tensor": record.name}
        dtype = DTYPES.get(record.dtype)
        if dtype is None:
            raise SchemaError("unknown dtype", got=record.dtype, **where)
        if isinstance(record, AliasTensor):
            target = records.get(record.alias_of)
            # No chains: aliases in a circle would have no bytes at all.
            if target is None or isinstance(target, AliasTensor):
                raise SchemaError(
                    "alias does not name a stored tensor", got=record.alias_of, **where
                )
            if (target.dtype, target.shape) != (record.dtype, record.shape):
                raise SchemaError(
                    "alias and its target differ in dtype or shape", got=record.alias_of, **where
                )
            continue
        if record.shard >= len(manifest.shards):
            raise SchemaError(
                "no such shard", got=record.shard, expected=f"below {len(manifest.shards)}", **where
            )
        if not isinstance(record, RawTensor):
            _check_coded(record, where)


def _check_coded(record: CodedTensor, where: dict[str, Any]) -> None:
    dtype = DTYPES[record.dtype]
    planes = dtype.planes
    if isinstance(record, Int8Tensor):
        planes = len(record.planes) if record.dtype in INT8_SOURCES else 0
    if len(record.shape) < 2 or record.elements == 0 or planes == 0 or len(record.planes) != planes:
        raise SchemaError(
            "scheme does not fit dtype and shape", got=f"{record.scheme} of {record.dtype}", **where
        )
    if isinstance(record, Int8Tensor):
        _check_axis(record, where)
    wrong_side = misplaced_side(record)
    if wrong_side is not None:
        too_many = wrong_side.checksum(record) is not None
        raise SchemaError(
            f"{wrong_side.title} do not fit the tensor",
            got="a checksum" if too_many else "no checksum",
            expected="none" if too_many else "one",
            **where,
        )
    if (record.tables_bytes is None) != (record.xxh3.tables is None):
        raise SchemaError("size and checksum of the rans tables stand together", **where)
    by_column = record.xxh3.col_scale is not None
    if isinstance(record, Int8Tensor):
        if (record.rounding is None) != (record.worst_steps is None) or (
            record.rounding is None and (by_column or record.wide or record.scale_dtype is not None)
        ):
            raise SchemaError(
                "rounding, its worst error, scales and planes do not fit each other", **where
            )
        if (record.deadzone is not None) != (record.rounding in (DEADZONE, FEEDBACK_DEADZONE)):
            raise SchemaError("rounding and deadzone do not fit each other", **where)
    elements = record.elements
    for plane in record.planes:
        if plane.raw_bytes != elements:
            raise SchemaError(
                "plane has a wrong size", got=plane.raw_bytes, expected=elements, **where
            )


def _check_axis(record: Int8Tensor, where: dict[str, Any]) -> None:
    last = len(record.shape) - 1
    by_column = record.channel_kind == "column"
    if record.channel_axis > last or (by_column and record.channel_axis != last):
        got = f"axis {record.channel_axis} ({record.channel_kind}) of {record.shape}"
        raise SchemaError("channel axis does not fit the shape", got=got, **where)


def _dump(value: Any) -> str:
    # Fixed separators: equal manifests have equal bytes.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
