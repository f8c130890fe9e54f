"""The fingerprint of a conversion: equal for two that write the same bytes, so that one can go on with the other's."""

from __future__ import annotations

import json
from dataclasses import fields

from codecllm.converter.write.manifest import Conversion, writer_versions
from codecllm.formats.checksums import sha256_hex

_WITHOUT_EFFECT = ("workers", "force")
"""Options that do not change a byte."""


def fingerprint_of(conversion: Conversion) -> str | None:
    """Returns a digest of everything on which the bytes of the shards depend, or None where that cannot be said.

    It covers the source's weight files (names, sizes, times), the plan, the options and the
    versions of what writes. Parameters that a caller chooses are covered only where they follow
    from recorded options (`repeatable`).
    """
    choice, plan = conversion.choice, conversion.plan
    if choice.provider is not None and not getattr(choice.provider, "repeatable", False):
        return None
    options = {
        field.name: str(getattr(conversion.options, field.name))
        for field in fields(conversion.options)
        if field.name not in _WITHOUT_EFFECT
    }
    facts = {
        "files": [[file.name, *file.identity] for file in conversion.model.files],
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
