"""`codecllm info`: the content of a container by its manifest, on the Hub without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.container import Container
from codecllm.formats.files import as_path
from codecllm.formats.manifest.manifest import BASELINE_NAME, Manifest
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, RawTensor, TensorRecord
from codecllm.formats.shards.side_tensors import scale_bytes
from codecllm.hub import check_environment, open_remote, resolve
from codecllm.verifier.baseline.baseline import describe_agreement
from codecllm.verifier.baseline.record import parse_baseline


def describe(folder: str | Path) -> dict[str, Any]:
    """Returns the figures of a container in a local folder as JSON values.

    Those of `describe_manifest`, and `agreement`: how the model agreed with its source when its
    baseline was recorded (`mean_kl` in nats and `top1` along the source's greedy continuations and,
    under `text`, on a fixed text, or `cosine` of hidden states); None without a baseline.
    """
    with Container(folder) as container:
        manifest = container.manifest
        facts = describe_manifest(manifest, container.manifest_sha256, container.manifest_bytes)
        record = manifest.file(BASELINE_NAME)
        baseline = None if record is None else parse_baseline(container.read_side_file(record))
        agreement = None if baseline is None else baseline.agreement
        figures = None if agreement is None else agreement.model_dump(exclude_none=True)
        return {"folder": str(folder), **facts, "agreement": figures}


def describe_name(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Returns the figures of a container.

    A local folder, or a Hub repository of which no weights are downloaded.

    Of a repository the manifest and the headers of all shards are read by range requests and
    compared; `hub` holds repository, commit and the bytes that were transferred. In offline mode
    the Hub's cache takes its place.

    Raises:
        UsageError: neither a folder nor a Hub id.
        HubError: the repository cannot be reached, found or read.
        FormatError: manifest, headers, sizes or sha256 do not agree.
    """
    check_arguments(revision=revision, token=token)
    check_environment()
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if as_path(name, "container").exists() or HF_HUB_OFFLINE:
        return describe(resolve(name, revision=revision, token=token, kind="manifest").folder)
    remote = open_remote(name, revision=revision, token=token)
    repository, manifest = remote.repository, remote.manifest
    facts = describe_manifest(manifest, remote.manifest_sha256, remote.manifest_bytes)
    hub = {
        "repo": repository.name,
        "commit": repository.commit,
        "transferred_bytes": repository.transferred_bytes,
        "listed_bytes": remote.manifest_bytes
        + sum(file.bytes for file in (*manifest.shards, *manifest.files)),
        "shard_headers": len(remote.headers),
        "known_sha256": remote.large_files,
    }
    # The agreement stands in a side file, of which nothing is read.
    return {"folder": None, **facts, "agreement": None, "hub": hub}


def describe_manifest(
    manifest: Manifest, manifest_sha256: str, manifest_bytes: int
) -> dict[str, Any]:
    """Returns the figures of a manifest as JSON values.

    `stored_bytes` of a tensor counts its chunks, scales and frequency tables, not its share of
    headers and manifest; those are in the totals.
    """
    tensors = [_describe_tensor(record) for record in manifest.tensors]
    weights = sum(
        record.elements for record in manifest.tensors if not isinstance(record, AliasTensor)
    )
    entropy = sum(tensor["entropy_bits"] for tensor in tensors)
    stored_bytes = manifest_bytes + sum(shard.bytes for shard in manifest.shards)
    return {
        "format_version": manifest.format_version,
        "writer": manifest.writer,
        "scheme": manifest.options.scheme,
        "codec": manifest.options.codec or "zstd",
        "options": manifest.options.model_dump(exclude_none=True),
        "calibration": manifest.calibration and manifest.calibration.model_dump(exclude_none=True),
        "source": manifest.source.model_dump(),
        "source_dtypes": _dtype_bytes(manifest.tensors),
        "manifest_sha256": manifest_sha256,
        "shards": [record.model_dump() for record in manifest.shards],
        "files": [record.model_dump() for record in manifest.files],
        "weights": weights,
        "source_bytes": manifest.source.tensor_bytes,
        "container_bytes": stored_bytes,
        # Against the source's own dtype, with all stored bytes (docs/decisions/ratio.md).
        "ratio": manifest.source.tensor_bytes / stored_bytes,
        "bits_per_weight": 8 * stored_bytes / max(1, weights),
        "entropy_bits_per_weight": entropy / max(1, weights),
        "tensors": tensors,
    }


def _dtype_bytes(records: list[TensorRecord]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for record in records:
        totals[record.dtype] = totals.get(record.dtype, 0) + record.source_bytes
    return totals


def _describe_tensor(record: TensorRecord) -> dict[str, Any]:
    # Every row has every key: readers of --json need no second case.
    row: dict[str, Any] = {
        "name": record.name,
        "scheme": record.scheme,
        "dtype": record.dtype,
        "shape": record.shape,
        "codec": None,
        "source_bytes": record.source_bytes,
        "stored_bytes": 0,
        "bits_per_weight": 0.0,
        "entropy_bits": 0,
        "entropy_bits_per_weight": 0.0,
        "worst_error": None,
        "scale_range": None,
        "rounding": None,
        "deadzone": None,
        "worst_steps": None,
        "wide": False,
        "column_scales": False,
        "alias_of": record.alias_of if isinstance(record, AliasTensor) else None,
        "fallback": getattr(record, "fallback", None),
    }
    if isinstance(record, AliasTensor):
        return row
    if isinstance(record, RawTensor):
        row["stored_bytes"], row["entropy_bits"] = record.source_bytes, 8 * record.source_bytes
    else:
        row["codec"] = "+".join(dict.fromkeys(plane.codec for plane in record.planes))
        row["stored_bytes"] = sum(plane.stored_bytes for plane in record.planes) + (
            record.tables_bytes or 0
        )
        row["entropy_bits"] = sum(plane.entropy_bits for plane in record.planes)
    if isinstance(record, Int8Tensor):
        scales = scale_bytes(record)
        row["stored_bytes"] += scales
        # Scales are not coded: they count in full in the bound too.
        row["entropy_bits"] += 8 * scales
        row["worst_error"], row["scale_range"] = record.worst_error, record.scale_range
        row |= {
            "rounding": record.rounding,
            "deadzone": record.deadzone,
            "worst_steps": record.worst_steps,
        }
        row["wide"] = record.wide
        row["column_scales"] = record.xxh3.col_scale is not None
    elements = max(1, record.elements)
    row["bits_per_weight"] = 8 * row["stored_bytes"] / elements
    row["entropy_bits_per_weight"] = row["entropy_bits"] / elements
    return row


def render(facts: dict[str, Any], console: Console) -> None:
    """Prints the table of tensors and the totals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold", min_width=16)
    for column in ("dtype", "shape", "scheme", "codec"):
        table.add_column(column, no_wrap=True)
    for column in ("stored", "bits/w", "bound", "worst error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in facts["tensors"]:
        # Names come from others: rich would read brackets in them as markup.
        table.add_row(*map(escape, _cells(row)))
    console.print(table)
    source = facts["source"]
    origin = f"{source['repo']} @ {source['commit']}" if source["repo"] else "a local folder"
    dtypes = ", ".join(f"{name} {size:,} B" for name, size in facts["source_dtypes"].items())
    console.print(
        f"\nformat {facts['format_version']}, scheme {facts['scheme']}, codec {facts['codec']}, "
        f"from {origin}",
        highlight=False,
        markup=False,
    )
    requested_options = {
        name: facts["options"][name]
        for name in ("bits", "ratio", "calibrate", "refine")
        if name in facts["options"]
    }
    if requested_options:
        console.print(
            "asked for  "
            + ", ".join(f"{name} {value}" for name, value in requested_options.items()),
            highlight=False,
            markup=False,
        )
    console.print(
        f"source     {facts['source_bytes']:>16,} bytes in {facts['weights']:,} weights ({dtypes})",
        highlight=False,
        markup=False,
    )
    console.print(
        f"container  {facts['container_bytes']:>16,} bytes in {len(facts['shards'])} shards and "
        "the manifest",
        highlight=False,
        markup=False,
    )
    console.print(
        f"ratio      {facts['ratio']:.3f}x   {facts['bits_per_weight']:.3f} bits per weight, all "
        "counted "
        f"(entropy bound {facts['entropy_bits_per_weight']:.3f})",
        highlight=False,
        markup=False,
    )
    if facts.get("agreement"):
        words = describe_agreement(facts["agreement"])
        console.print(f"quality    {words}, against the source", highlight=False, markup=False)
    console.print(f"manifest   sha256 {facts['manifest_sha256']}", highlight=False, markup=False)
    if "hub" in facts:
        _render_hub(facts["hub"], console)


def _render_hub(hub: dict[str, Any], console: Console) -> None:
    console.print(f"hub        {hub['repo']} @ {hub['commit']}", highlight=False, markup=False)
    console.print(
        f"read       {hub['transferred_bytes']:,} of {hub['listed_bytes']:,} bytes, no weights: "
        "manifest and shard headers "
        f"({hub['shard_headers']}); they agree with each other, all sizes, and "
        f"{hub['known_sha256']} sha256 on the Hub",
        highlight=False,
        markup=False,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    scheme = row["scheme"] + ("*" if row["fallback"] else "")
    scheme += ("+cols" if row["column_scales"] else "") + ("+wide" if row["wide"] else "")
    if row["alias_of"]:
        return [
            row["name"],
            row["dtype"],
            _shape(row["shape"]),
            "alias",
            f"= {row['alias_of']}",
            "",
            "",
            "",
            "",
        ]
    worst = f"{row['worst_error']:.3g}" if row["worst_error"] is not None else ""
    return [
        row["name"],
        row["dtype"],
        _shape(row["shape"]),
        scheme,
        row["codec"] or "",
        f"{row['stored_bytes']:,}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['entropy_bits_per_weight']:.3f}",
        worst,
    ]


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
