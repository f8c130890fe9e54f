"""The containers of `conformance/`, as bytes: readers return or refuse them by SPEC.md."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import zstandard

from codecllm.formats import errors
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.manifest import KNOWN_FEATURES
from codecllm.verifier import verify
from tests.conformance.faults import all_faults
from tests.conformance.make import BAD, EXPECTED, GOOD, facts_of, slug
from tests.golden import independent_checks as checks
from tests.golden import independent_reader
from tests.golden.independent_checks import RuleError
from tests.golden.independent_reader import read_container
from tests.malformed.builders import read_everything, read_tensors
from tests.unit.formats.spec_rules import spec_rules

MOST_BYTES = 2_250_000
GOOD_ONES = json.loads((GOOD / EXPECTED).read_text())
BAD_ONES = json.loads((BAD / EXPECTED).read_text())


@pytest.mark.parametrize("name", GOOD_ONES)
def test_good_container_is_read(name):
    assert facts_of(GOOD / name) == GOOD_ONES[name]["tensors"]
    read_everything(GOOD / name)
    report = verify(GOOD / name, baseline=False)
    assert report.ok, report.to_json()


@pytest.mark.parametrize("name", GOOD_ONES)
def test_good_container_is_read_by_the_independent_reader(name):
    tensors = read_container(GOOD / name)
    digests = {key: sha256_hex(data) for key, data in tensors.items()}
    assert digests == {key: facts["sha256"] for key, facts in GOOD_ONES[name]["tensors"].items()}


@pytest.mark.parametrize("name", BAD_ONES)
def test_bad_container_is_refused_with_the_error_of_its_rule(name):
    expected = BAD_ONES[name]
    error = getattr(errors, expected["error"])
    if not expected["verifier_only"]:
        with pytest.raises(CodecLLMError) as caught:
            _read(BAD / name)
        assert type(caught.value) is error, repr(caught.value)
        return
    report = verify(BAD / name, baseline=False)
    findings = [finding for stage in report.stages for finding in stage.findings]
    assert error in {type(finding.error) for finding in findings}, report.to_json()


@pytest.mark.parametrize("name", BAD_ONES)
def test_bad_container_is_refused_by_the_independent_reader(name):
    """Its checks of manifest and headers find the very rule; its other checks just fail."""
    # The library zstandard has an error of its own for damaged frames.
    errors_of_bytes = (AssertionError, ArithmeticError, LookupError, OSError, struct.error)
    with pytest.raises((RuleError, *errors_of_bytes, zstandard.ZstdError)) as caught:
        read_container(BAD / name)
    if isinstance(caught.value, RuleError):
        assert str(caught.value) == BAD_ONES[name]["rule"]


def test_the_independent_reader_names_most_rules_of_manifest_and_headers():
    text = Path(checks.__file__).read_text() + Path(independent_reader.__file__).read_text()
    named = set(re.findall(r'refuse\(\s*"([\d.a-z]+)"', text))
    sections = ("3", "4", "8", "9", "10")
    rules = {name for name in spec_rules() if re.split(r"[.a-z]", name)[0] in sections}
    # Missing files, links, digests and the order of 3i need no check of their own in Python.
    without = {"3a", "3c", "3g", "3h", "3i", "3j", "4m", "4n", "8.3m", "8.1a", "8.1c"}
    assert rules - named <= without


def _read(folder):
    """Reads the tensors, as a loader does, then every listed file."""
    read_tensors(folder)
    read_everything(folder)


def test_every_rule_has_a_bad_container_and_every_container_a_rule_of_the_text():
    rules = spec_rules()
    assert {facts["rule"] for facts in BAD_ONES.values()} == set(rules)
    for name, facts in BAD_ONES.items():
        rule = rules[facts["rule"]]
        assert (facts["error"], facts["verifier_only"]) == (rule.error, rule.verifier_only), name


def test_expected_files_name_the_containers_that_are_there():
    for folder, expected in ((GOOD, GOOD_ONES), (BAD, BAD_ONES)):
        assert {path.name for path in folder.iterdir()} == {*expected, EXPECTED}
    assert {f"{fault.rule}-{slug(fault.name)}" for fault in all_faults()} == set(BAD_ONES)


def test_bad_containers_differ_from_each_other():
    contents = [
        {str(file.relative_to(BAD / name)): file.read_bytes() for file in _files(BAD / name)}
        for name in BAD_ONES
    ]
    assert all(one not in contents[:place] for place, one in enumerate(contents))


def test_good_containers_hold_every_dtype_codec_scheme_and_feature():
    dtypes, codecs, schemes, features, kinds, scales = set(), set(), set(), set(), set(), set()
    for name in GOOD_ONES:
        with Container(GOOD / name) as container:
            features |= set(container.manifest.required_features)
            for record in container.manifest.tensors:
                schemes.add(record.scheme)
                codecs |= {plane.codec for plane in getattr(record, "planes", [])}
                dtypes |= {record.dtype} if record.scheme == "lossless" else set()
                if record.scheme == "int8":
                    kinds.add((record.channel_kind, record.dtype))
                    scales.add((record.scale_dtype, record.xxh3.col_scale is not None))
    assert dtypes == {name for name, dtype in DTYPES.items() if dtype.planes}
    assert codecs == {"raw", "zstd", "rans"}
    assert schemes == {"raw", "lossless", "int8", "alias"}
    assert features == KNOWN_FEATURES
    assert {("row", "F32"), ("row", "BF16"), ("row", "F16"), ("column", "F32")} <= kinds
    assert scales == {(None, False), (None, True), ("BF16", False), ("BF16", True)}


def test_the_containers_stay_small():
    assert sum(path.stat().st_size for path in _files(GOOD.parent)) <= MOST_BYTES


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())
