"""A fault at any operation of a conversion leaves a whole container or none, and no litter."""

from __future__ import annotations

import shutil

import pytest

from codecllm.converter.write.staging import STAGING_NAME
from tests.faults.shim import (
    ALL_FAULTS,
    FAULTS,
    OWN_FILES,
    command,
    command_with_baseline,
    files_of,
)

STOPPED = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGINT twice": 130}
pytestmark = pytest.mark.timeout(3600 if ALL_FAULTS else 300)
STRIDES = {"ENOSPC": 12, "kill": 12}
CLEANING = 6  # operations behind the commit: staging is removed


def _steps(fault, operations):
    """A part of the operations, another one for each fault; all with CODECLLM_ALL_FAULTS."""
    if ALL_FAULTS:
        return range(1, operations + 1)
    stride = STRIDES.get(fault, 24)
    steps = {*range(1 + FAULTS.index(fault) % stride, operations + 1, stride)}
    if fault == "kill":  # nothing but the order in which they are removed tells these apart
        steps |= {*range(operations - CLEANING, operations + 1)}
    return sorted(steps)


def _placed(out):
    """Everything in the output folder but the staging folder."""
    files = files_of(out) if out.exists() else {}
    return {name: data for name, data in files.items() if not name.startswith(STAGING_NAME)}


def _check_message(done, fault, whole):
    assert "Traceback" not in done.text
    if fault in STOPPED:
        assert done.code == STOPPED[fault], done.text
        # A signal that is handled behind the last operation finds nothing to say of the output.
        assert whole or "is complete" not in done.text, done.text
    elif not whole:
        assert done.code == 4, done.text


def _check_new(server, source, expected, base, fault, at, make_command=command):
    out = base / "deep" / "out"
    convert = make_command(source, out)
    done = server.run(convert, base, fault, at)
    found = _placed(out)
    whole = found == expected
    if done.code == 0:
        assert whole, (fault, at, sorted(found))
    elif fault != "kill":
        _check_message(done, fault, whole)
        if "could not be removed" not in done.text:
            assert whole or not (base / "deep").exists(), (
                fault,
                at,
                sorted(found),
            )
            assert not (out / STAGING_NAME).exists(), (fault, at)
    elif not whole:
        assert "codecllm.json" not in found, (fault, at)
    if whole:
        refused = server.run(convert, base)
        assert refused.code == 2, refused.text
        assert files_of(out) == expected, (fault, at)
        assert not (out / STAGING_NAME).exists(), (fault, at)
    else:
        again = server.run(convert, base)
        assert again.code == 0, (fault, at, again.text)
        assert files_of(out) == expected, (fault, at)


def _check_replaced(server, source, expected, old, base, fault, at):
    before = files_of(old)
    after = expected | OWN_FILES
    out = shutil.copytree(old, base / "out")
    done = server.run(command(source, out, "--force"), base, fault, at)
    found = _placed(out)
    assert fault == "kill" or found in (before, after) or "could not be" in done.text, (fault, at)
    if fault not in ("kill", "none") and done.code:
        _check_message(done, fault, found == after)
    if found != after:
        refused = server.run(command(source, out), base)
        assert refused.code == 2, (fault, at, refused.text)
        assert "--force replaces it" in refused.text
        assert _placed(out) == before, (fault, at)
        assert server.run(command(source, out, "--force"), base).code == 0, (fault, at)
        assert files_of(out) == after, (fault, at)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short", "kill", *STOPPED, "dead"])
def test_a_new_container_is_whole_or_not_there(server, source, undisturbed, tmp_path, fault):
    expected, operations = undisturbed
    assert operations > 30
    for at in _steps(fault, operations):
        base = tmp_path / str(at)
        base.mkdir()
        _check_new(server, source, expected, base, fault, at)
        shutil.rmtree(base)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short", "kill", *STOPPED, "dead"])
def test_a_new_container_has_its_baseline_or_is_not_there(
    server, source, with_baseline, tmp_path, fault
):
    """Faults from the middle on: before the baseline the operations are those of the test above."""
    expected, operations = with_baseline
    for at in _steps(fault, operations):
        if at > operations // 2:
            base = tmp_path / str(at)
            base.mkdir()
            _check_new(server, source, expected, base, fault, at, command_with_baseline)
            shutil.rmtree(base)


@pytest.mark.parametrize("fault", ["ENOSPC", "kill", "SIGTERM", "SIGINT twice", "dead"])
def test_a_replaced_container_is_the_old_one_or_the_new_one(
    server, source, undisturbed, old, tmp_path, fault
):
    expected, _ = undisturbed
    folder, _, operations = old
    for at in _steps(fault, operations):
        base = tmp_path / str(at)
        base.mkdir()
        _check_replaced(server, source, expected, folder, base, fault, at)
        shutil.rmtree(base)
