"""A power cut at any operation of a conversion loses no container and makes no half one.

The log of a real conversion is replayed up to each operation. What was not forced to the disk by
then is lost, or kept, or survives in part (disk.py).
"""

from __future__ import annotations

import shutil

import pytest

from codecllm.converter.write.staging import STAGING_NAME
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from tests.faults.disk import Disk, flat, read_log, read_tree, ways, write_tree
from tests.faults.shim import (
    ALL_FAULTS,
    OWN_FILES,
    command,
    command_with_baseline,
    files_of,
)

pytestmark = pytest.mark.timeout(3600 if ALL_FAULTS else 300)
RANDOM_WAYS = 20 if ALL_FAULTS else 6


def _left_by_cuts(disk, lines):
    """Yields the number of each operation, and each tree that a power cut may leave before it."""
    for number, line in enumerate([*lines, None]):
        seen = set()
        for way, survives in ways(RANDOM_WAYS, number).items():
            tree = disk.surviving(survives)
            key = frozenset(flat(tree).items())
            if key not in seen:
                seen.add(key)
                yield number, way, tree
        if line is not None:
            disk.apply(*line)


def _placed(tree):
    """The files of the output folder but those of the staging folder."""
    for name in ("deep", "out"):
        tree = tree.get(name, {})
    return {name: data for name, data in flat(tree).items() if not name.startswith(STAGING_NAME)}


def _logged(server, arguments, base, tmp_path, fault="none", at=0):
    """Runs a conversion; returns its end, the disk as it was before, and the operations."""
    disk = Disk(base, read_tree(base))
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    done = server.run(arguments, base, fault, at, log=log)
    return done, disk, list(read_log(log))


class _Again:
    """Runs the command on trees that a power cut left: all, or every n-th of them."""

    def __init__(self, server, base, stride):
        self._server, self._base = server, base
        self._stride = 1 if ALL_FAULTS else stride
        self._seen = set()
        self.runs = 0

    def run(self, cut, tree, commands):
        key = frozenset(flat(tree).items())
        if key in self._seen:
            return
        self._seen.add(key)
        if len(self._seen) % self._stride:
            return
        self.runs += 1
        shutil.rmtree(self._base)
        self._base.mkdir()
        write_tree(tree, self._base)
        for arguments, code, expected in commands:
            done = self._server.run(arguments, self._base)
            assert done.code == code, (cut, done.text)
            found = _placed(read_tree(self._base))
            assert found in expected, (cut, sorted(found))


def test_the_log_holds_every_operation(server, source, tmp_path):
    """Without a loss the replay gives the folder itself."""
    base = tmp_path / "base"
    base.mkdir()
    convert = command(source, base / "deep" / "out")
    _, disk, lines = _logged(server, convert, base, tmp_path)
    for line in lines:
        disk.apply(*line)
    assert disk.surviving(lambda node: 1) == read_tree(base)


@pytest.mark.parametrize("baseline", [False, True])
def test_a_new_container_after_a_power_cut(
    server, source, undisturbed, with_baseline, tmp_path, baseline
):
    expected, _ = with_baseline if baseline else undisturbed
    base = tmp_path / "base"
    base.mkdir()
    make_command = command_with_baseline if baseline else command
    convert = make_command(source, base / "deep" / "out")
    _, disk, lines = _logged(server, convert, base, tmp_path)
    again = _Again(server, base, 20 if baseline else 16)
    cuts = 0
    for number, way, tree in _left_by_cuts(disk, lines):
        cuts += 1
        found = _placed(tree)
        assert MANIFEST_NAME not in found or found == expected, (number, way, sorted(found))
        # Behind the last operation the command ended with success.
        assert number < len(lines) or found == expected, (way, sorted(found))
        again.run((number, way), tree, [(convert, 2 if found == expected else 0, [expected])])
    print(f"{len(lines)} operations, {cuts} trees, {again.runs} conversions after a cut")
    assert again.runs > 5


@pytest.mark.parametrize("failing", [None, 0.65, 0.75, 0.82])
def test_a_replaced_container_after_a_power_cut(
    server, source, undisturbed, old, tmp_path, failing
):
    """Also where an operation of the commit fails, and the cut comes while it is undone."""
    new = undisturbed[0] | OWN_FILES
    base = tmp_path / "base"
    out = base / "deep" / "out"
    out.parent.mkdir(parents=True)
    shutil.copytree(old[0], out)
    before = files_of(out)
    convert = command(source, out, "--force")
    at = round(old[2] * failing) if failing else 0
    done, disk, lines = _logged(server, convert, base, tmp_path, "EIO", at)
    assert done.code == (4 if failing else 0), done.text
    again = _Again(server, base, 16)
    cuts = 0
    for number, way, tree in _left_by_cuts(disk, lines):
        cuts += 1
        cut = number, way
        found = _placed(tree)
        assert MANIFEST_NAME not in found or found in (before, new), (cut, sorted(found))
        assert number < len(lines) or found == (before if failing else new), (cut, sorted(found))
        assert found.items() >= OWN_FILES.items(), cut
        # Without --force the next conversion is refused, with the old container in its place again.
        refused = (command(source, out), 2, [new if found == new else before])
        again.run(cut, tree, [refused, (convert, 0, [new])])
    print(f"{len(lines)} operations, {cuts} trees, {again.runs} conversions after a cut")
    assert again.runs > 5
