"""Containers with one changed value and valid checksums: a typed error, or the right size.

Random bytes never pass a seal, so they only try the first check of a reader. These changes reach
all of them.
"""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codecllm.converter import ParamsChoice, Rate, convert
from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.records import Calibration
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.shards.chunk_table import RECORD
from tests import tampering
from tests.malformed import builders
from tests.malformed.builders import SHARD
from tests.sources import write_source
from tests.stepped import make_steps

_INTERESTING = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        8,
        9,
        16,
        40,
        64,
        255,
        2**31,
        2**32,
        2**48,
        2**53,
        2**53 + 1,
        2**64,
        0.0,
        1.5,
        -0.0,
    ),
    *(
        "",
        "q",
        "l",
        "q_scale",
        "raw",
        "lossless",
        "int8",
        "alias",
        "zstd",
        "row",
        "column",
        "I64",
        "F4",
        "F16",
        "BOOL",
        "U8",
    ),
    *(
        "0" * 16,
        "0" * 64,
        "../x",
        "a/b",
        "é",
        "x" * 600,
        [],
        {},
        [[]],
        [{}],
        [0],
        [0, 0],
        [1, 2, 3],
        {"a": 1},
        {"": []},
    ),
)
values = st.sampled_from(_INTERESTING) | st.integers(-(2**54), 2**54) | st.text(max_size=6)
places = st.lists(st.integers(0, 2**16), min_size=1, max_size=8)
kinds = st.sampled_from(["set", "set", "set", "drop", "add"])


def _mutate(document: Any, place: list[int], kind: str, value: Any) -> None:
    """Walks into the document by the numbers of `place`; sets, drops or adds a value at the end."""
    parent, key = None, None
    for number in place:
        if not isinstance(document, (dict, list)) or not document:
            break
        keys = list(document) if isinstance(document, dict) else range(len(document))
        parent, key = document, keys[number % len(keys)]
        document = document[key]
    if kind == "drop":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[str(value)[:40] + "+"] = copy.deepcopy(value)
    elif kind == "add":
        parent.append(copy.deepcopy(value))
    else:
        parent[key] = copy.deepcopy(value)


def _read(folder):
    """Reads every tensor; each has the size that its record says."""
    with suppress(CodecLLMError), Container(folder) as container:
        for record in container.manifest.files:
            with suppress(CodecLLMError):
                container.check_file(record)
        for name, record in container.records.items():
            with suppress(CodecLLMError):
                assert len(read_tensor_bytes(container, name)) == record.source_bytes


def _workplace(folder):
    """Returns a function that restores a container and returns its folder."""
    kept = {path: path.read_bytes() for path in (folder / MANIFEST_NAME, folder / SHARD)}

    def restore():
        for path, data in kept.items():
            path.write_bytes(data)
        return folder

    return restore


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return _workplace(builders.make_container(tmp_path_factory.mktemp("mutations")))


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """Scales and order of columns, wide codes, and everything that a manifest may say of them."""
    base = tmp_path_factory.mktemp("columns")
    values = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    source = write_source(
        base / "source", {"q": ("F32", values), "w": ("F32", values * 2)}, {"model_type": "none"}
    )
    calibration = Calibration(kind="self", tokens=1, seed=0, sha256="0" * 64)
    rate = Rate(bits=5.0, calibrate="self", refine=True)
    factors = {"q": 0.3, "w": 0.015}
    choice = ParamsChoice(
        lambda plan: make_steps(plan, factors[plan.source.name]), rate, calibration
    )
    convert(source, base / "c", include=("*",), choice=choice)
    return _workplace(base / "c")


@given(place=places, kind=kinds, value=values)
def test_any_value_of_a_manifest_with_columns(columns, place, kind, value):
    folder = columns()
    tampering.reseal(folder, lambda document: _mutate(document, place, kind, value))
    _read(folder)


@given(place=places, kind=kinds, value=values)
def test_any_value_of_the_manifest(workplace, place, kind, value):
    folder = workplace()
    tampering.reseal(folder, lambda document: _mutate(document, place, kind, value))
    _read(folder)


@given(place=places, kind=kinds, value=values)
def test_any_value_of_a_shard_header(workplace, place, kind, value):
    folder = workplace()
    builders.edit_header(folder, lambda header: _mutate(header, place, kind, value))
    _read(folder)


@given(
    tensor=st.sampled_from(["l", "q", "h.0.attn.c_attn.weight"]),
    side=st.sampled_from(["_chunks", "_shape", "_scale"]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_byte_of_side_data(workplace, tensor, side, changes):
    def edit(tensors):
        data = tensors.get(tensor + side, tensors[tensor + "_chunks"])[2]
        for place, value in changes:
            data[place % len(data)] = value

    folder = workplace()
    builders.rewrite_shard(folder, edit)
    _read(folder)


@given(
    tensor=st.sampled_from(["l", "q", "h.0.attn.c_attn.weight"]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    near_frame_header=st.booleans(),
)
def test_any_byte_of_a_payload(workplace, tensor, changes, near_frame_header):
    """The decoder itself has to hold: the chunk's checksum fits."""

    def edit(tensors):
        payload = tensors[tensor][2]
        stored = int(
            np.frombuffer(tensors[tensor + "_chunks"][2], RECORD, offset=32)["stored_bytes"][0]
        )
        for place, value in changes:
            payload[place % min(stored, 24 if near_frame_header else stored)] = value
        builders.fix_chunks(tensors, tensor)

    folder = workplace()
    builders.rewrite_shard(folder, edit)
    _read(folder)


def test_the_mutations_change_something(workplace):
    """Guards the tests above: a walk ends in the document, each kind of change is seen."""
    document = json.loads((workplace() / MANIFEST_NAME).read_bytes())
    for kind in ("set", "drop", "add"):
        changed = copy.deepcopy(document)
        _mutate(changed, [8, 1, 3], kind, {"x": 1})
        assert changed != document
