"""The index of a container's shards, by which transformers and other tools find its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codecllm.formats import limits
from codecllm.formats.errors import LayoutError
from codecllm.formats.manifest.manifest import INDEX_NAME
from codecllm.formats.strict_json import parse_json_object

if TYPE_CHECKING:
    from codecllm.formats.container import Container


def check_index(container: Container) -> None:
    """Checks that the index, where one is listed, maps every stored name to its shard.

    transformers opens the files that it names, wherever they are, and takes weights for those of
    their folder.

    Raises:
        LayoutError: it maps another name, or to another file.
        FormatError: it is no JSON object, or differs from the manifest; or a shard is damaged.
    """
    record = container.manifest.file(INDEX_NAME)
    if record is None:
        return
    data = container.read_side_file(record)
    index = parse_json_object(data, file=INDEX_NAME, max_bytes=limits.MANIFEST_BYTES)
    expected: dict[str, str] = {}
    for number, shard in enumerate(container.manifest.shards):
        expected |= dict.fromkeys(container.shard(number)[1].tensors, shard.name)
    if index.get("weight_map") != expected:
        raise LayoutError("weight_map differs from the names in the shards", file=INDEX_NAME)
