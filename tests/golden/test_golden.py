"""Containers of every released format version, kept as they were written.

Each later reader decodes them to the same bits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.manifest import KNOWN_FEATURES
from codecllm.formats.manifest.records import NEAREST
from codecllm.formats.reference import read_tensor_bytes, tensor_digest
from tests.golden import independent_checks, independent_reader
from tests.golden.independent_reader import read_container
from tests.sources import bf16, write_source

HERE = Path(__file__).parent
VERSIONS = ["v1.0", "v1.1", "v1.2", "v1.3"]
NEWEST = HERE / VERSIONS[-1]


def _lossless_tensors():
    rng = np.random.default_rng(10)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype.planes == 0:
            continue
        if name == "BF16":
            values = bf16(rng.standard_normal((24, 90)))
        elif dtype.is_float and dtype.bits > 8:
            values = rng.standard_normal((24, 90)).astype(f"f{dtype.itemsize}")
        else:
            values = rng.integers(0, 2 if name == "BOOL" else 5, (48, 90)).astype(
                f"<u{dtype.itemsize}"
            )
        tensors[f"{name.lower()}.weight"] = (name, values)
    return tensors | {
        "scalar": ("F32", np.array(1.5, np.float32)),
        "empty": ("F16", np.zeros((0, 4), np.float16)),
    }


def _int8_tensors():
    rng = np.random.default_rng(11)
    heavy = (rng.standard_normal((40, 64)) ** 3).astype(np.float32)
    return {
        "rows": ("F32", heavy),
        "h.0.attn.c_attn.weight": ("F32", (rng.standard_normal((48, 36)) ** 3).astype(np.float32)),
        "experts.down_proj": (
            "BF16",
            bf16(rng.standard_normal((3, 20, 50)) ** 3).reshape(3, 20, 50),
        ),
        "half": ("F16", (rng.standard_normal((30, 70)) ** 3).astype(np.float16)),
        "long": ("BF16", bf16(np.arange(140_000) % 251).reshape(1, -1)),
        "norm": ("F32", np.ones(16, np.float32)),
    }


def _make(folder):
    """Writes the golden containers.

    Only for a new format version: those of a released one are never made again.

    v1.0 held what that version has, with codec `zstd`, and tied tensors in two shards; v1.1 codec
    `rans`, of lossless and int8 tensors; v1.2 scales of columns and wide codes; v1.3 holds what
    came after it.
    """
    make_quantized(folder)
    with Container(folder / "container") as container:
        digests = {key: sha256_hex(read_tensor_bytes(container, key)) for key in container.records}
    (folder / "container").rename(folder / "quantized")
    shutil.rmtree(folder / "source")
    (folder / "expected.json").write_text(json.dumps({"quantized": digests}, indent=1) + "\n")


def make_quantized(folder):
    """Writes a container with everything of format 1.3.

    Another quantization, code, and a name that is not plain.
    """
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig"},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    }
    source = write_source(folder / "source", _quantized_tensors(), config)
    (source / "own.py").write_text('"""Code that must not run by itself."""\n\nraise SystemExit\n')
    (source / "1 old (copy)").mkdir()
    (source / "1 old (copy)" / "vocab \u00fc.txt").write_text("a\n")
    convert(source, folder / "container", scheme="lossless", with_code=True)
    return folder / "container"


def _quantized_tensors():
    rng = np.random.default_rng(13)
    return {
        "w.weight": ("F8_E4M3", rng.binomial(64, 0.5, (64, 96)).astype(np.uint8)),
        "w.weight_scale_inv": ("F32", rng.random((4, 6), np.float32)),
        "side": ("BF16", bf16(rng.standard_normal((64, 96)))),
        "side_shape": ("I64", np.array([64, 96], np.int64)),
    }


def _tensors_of_two_groups():
    """Long enough for several frequency tables, and nearly constant: the container stays small."""
    return {"groups": ("U8", (np.arange(1_200_000) % 97 == 0).astype(np.uint8).reshape(1200, 1000))}


def test_update_golden(request):
    """Does nothing unless --update-golden is given."""
    if not request.config.getoption("--update-golden"):
        assert all((HERE / version / "expected.json").exists() for version in VERSIONS), (
            "golden containers are missing"
        )
        return
    assert not os.environ.get("CI"), "golden containers are not made in CI"
    shutil.rmtree(NEWEST, ignore_errors=True)
    NEWEST.mkdir()
    _make(NEWEST)


def _expected(version):
    path = HERE / version / "expected.json"
    return json.loads(path.read_text()) if path.exists() else {}


CONTAINERS = [(version, name) for version in VERSIONS for name in sorted(_expected(version))]


@pytest.mark.parametrize(("version", "name"), CONTAINERS)
def test_every_tensor_decodes_to_the_recorded_bits(version, name):
    expected = _expected(version)[name]
    with Container(HERE / version / name) as container:
        for record in (*container.manifest.files, *container.manifest.shards):
            container.check_file(record)
        assert sorted(container.records) == sorted(expected)
        for key, record in container.records.items():
            assert sha256_hex(read_tensor_bytes(container, key)) == expected[key], key
            if record.scheme != "alias":
                assert tensor_digest(container, key) == record.digest


@pytest.mark.parametrize(("version", "name"), CONTAINERS)
def test_a_reader_written_from_the_specification_gives_the_same_bits(version, name):
    """SPEC.md says enough, and the reference follows it."""
    data = read_container(HERE / version / name)
    assert {key: sha256_hex(tensor) for key, tensor in data.items()} == _expected(version)[name]


def test_the_other_reader_shares_no_code():
    for module in (independent_reader, independent_checks):
        text = Path(module.__file__).read_text()
        imported = set(re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE))
        assert not any(name.split(".")[0] == "codecllm" for name in imported)
        assert {name for name in imported if name.startswith("tests")} <= {"tests.golden"}


def test_golden_containers_hold_every_scheme_codec_and_dtype():
    schemes, codecs, dtypes, kinds, features, roundings, sides = (
        set(),
        set(),
        set(),
        set(),
        set(),
        set(),
        set(),
    )
    low_bits = set()
    for version, name in CONTAINERS:
        with Container(HERE / version / name) as container:
            features |= set(container.manifest.required_features)
            for record in container.manifest.tensors:
                roundings.add(getattr(record, "rounding", None))
                if getattr(record, "wide", False):
                    low_bits |= set(container.tensor(record.name).table.low_bits)
                schemes.add(record.scheme)
                if record.scheme == "int8":
                    sides.add(
                        (
                            record.scale_dtype,
                            record.xxh3.col_scale is not None,
                            record.xxh3.col_group is not None,
                        )
                    )
                codecs |= {plane.codec for plane in getattr(record, "planes", [])}
                dtypes |= {record.dtype} if record.scheme == "lossless" else set()
                kinds.add(getattr(record, "channel_kind", "row"))
    assert schemes == {"raw", "lossless", "int8", "alias"}
    assert codecs == {"raw", "zstd", "rans"}
    assert dtypes == {name for name, dtype in DTYPES.items() if dtype.planes}
    assert kinds == {"row", "column"}
    assert len(low_bits) > 1
    assert features == KNOWN_FEATURES
    assert roundings == {None, NEAREST, "feedback"}
    assert sides == {
        (dtype, *columns)
        for dtype in (None, "BF16")
        for columns in ((False, False), (True, False), (True, True))
    }


def test_golden_tensors_are_those_of_their_sources():
    """The recorded bits are not only stable but right."""
    lossless = _lossless_tensors()
    for path, tensors in (
        ("v1.0/lossless", lossless),
        ("v1.1/lossless-rans", lossless | _tensors_of_two_groups()),
    ):
        with Container(HERE / path) as container:
            for key, (_, values) in tensors.items():
                assert read_tensor_bytes(container, key) == values.tobytes(), key
