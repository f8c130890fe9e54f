"""The fingerprint of a conversion: equal for two conversions that write the same bytes.

So one can go on with the shards of the other.
"""

from __future__ import annotations

import json
from dataclasses import fields

from codecllm.converter.source.files import read_bytes
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.manifest import Conversion, writer_versions
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.manifest.manifest import CONFIG_NAME
from codecllm.formats.strict_json import CONFIG_BYTES

# Options that do not change a byte.
_WITHOUT_EFFECT = ("workers", "force")


def fingerprint_of(conversion: Conversion) -> str | None:
    """Returns a digest of everything on which the bytes of the shards depend.

    None where they depend on more than can be listed.

    It covers the source's weight files (names, sizes, times), its config, the plan, the options and
    the versions of the writer and its libraries. Parameters that a caller chooses are covered only
    where they follow from recorded options (`repeatable`).
    """
    choice, plan = conversion.choice, conversion.plan
    # A caller's own function may answer otherwise the next time.
    if choice.provider is not None and not getattr(choice.provider, "repeatable", False):
        return None
    options = {
        field.name: str(getattr(conversion.options, field.name))
        for field in fields(conversion.options)
        if field.name not in _WITHOUT_EFFECT
    }
    facts = {
        # Times and sizes, not contents: hashing the source would cost a pass over it.
        "files": [[file.name, *file.identity] for file in conversion.model.files],
        # Blocks of quantized weights, channels and what a model runs depend on it.
        "config": _config_sha256(conversion.model),
        "shards": [
            [[tensor.source.name, tensor.scheme, tensor.codec] for tensor in shard]
            for shard in plan.shards
        ],
        "aliases": plan.aliases,
        "options": options,
        "choice": [str(choice.rate), str(choice.calibration)],
        "versions": writer_versions(),
    }
    return sha256_hex(json.dumps(facts, sort_keys=True).encode())


def _config_sha256(model: SourceModel) -> str | None:
    if model.config is None:
        return None
    return sha256_hex(read_bytes(model.folder, CONFIG_NAME, CONFIG_BYTES))
