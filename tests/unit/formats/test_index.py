"""The index of a container maps every stored name to its shard, where one is listed."""

from __future__ import annotations

import json

import pytest

from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, FormatError, LayoutError
from codecllm.formats.manifest.manifest import INDEX_NAME
from codecllm.formats.shards.index import check_index
from tests import tampering
from tests.malformed.builders import make_container


def _check(folder):
    with Container(folder) as container:
        check_index(container)


def test_the_index_of_a_conversion_holds(tmp_path):
    _check(make_container(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda names: names.popitem(),
        lambda names: names.update(more=next(iter(names.values()))),
        lambda names: names.update(dict.fromkeys(names, "../other.safetensors")),
        lambda names: names.clear(),
    ],
)
def test_another_map_is_refused(tmp_path, change):
    folder = make_container(tmp_path)
    document = json.loads((folder / INDEX_NAME).read_bytes())
    change(document["weight_map"])
    tampering.replace_listed(folder, INDEX_NAME, json.dumps(document).encode())
    with pytest.raises(LayoutError, match="weight_map differs"):
        _check(folder)


def test_what_is_no_index_is_refused(tmp_path):
    folder = make_container(tmp_path)
    for data in (b"[]", b"{", b'{"weight_map": 5}'):
        tampering.replace_listed(folder, INDEX_NAME, data)
        with pytest.raises(FormatError, match=INDEX_NAME):
            _check(folder)
    tampering.flip_bit(folder / INDEX_NAME, 0)
    with pytest.raises(ChecksumError):
        _check(folder)


def test_an_index_that_is_not_listed_is_not_read(tmp_path):
    folder = make_container(tmp_path)

    def unlist(manifest):
        manifest["files"] = [one for one in manifest["files"] if one["name"] != INDEX_NAME]

    tampering.reseal(folder, unlist)
    (folder / INDEX_NAME).write_bytes(b"[]")
    _check(folder)
