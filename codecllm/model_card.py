"""The model card of a container.

README.md for the Hub, every figure of it from the manifest and the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from codecllm.formats.container import Container
from codecllm.formats.errors import SchemaError
from codecllm.formats.manifest.manifest import BASELINE_NAME, CODE, CODE_SUFFIX, Manifest
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.strict_json import parse_config
from codecllm.hub import BaseModel
from codecllm.info import describe_manifest
from codecllm.text import in_markdown
from codecllm.verifier.baseline.record import Baseline, parse_baseline

MARKER = "<!-- Written by `codecllm push`. A README.md without this line is never replaced. -->"
_SCHEMES = {
    "int8": "int8, one float32 scale per output channel; norms, biases, routers and positional "
    "embeddings keep every bit",
    "lossless": "lossless: every tensor comes back bit for bit",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_./-]+")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def make_card(container: Container, repo: str, base: BaseModel | None) -> str:
    """Returns the text of README.md.

    Args:
        container: the container; its baseline is read where it has one.
        repo: `user/name` under which it will be found.
        base: the model it was made from, as the Hub knows it; None where that is not known.

    Raises:
        FormatError: its config.json is no JSON object, or names no classes.
    """
    manifest = container.manifest
    record = manifest.file(BASELINE_NAME)
    baseline = parse_baseline(container.read_side_file(record)) if record is not None else None
    facts = describe_manifest(manifest, container.manifest_sha256, container.manifest_bytes)
    base_name = base.repo if base is not None else manifest.source.repo
    parts = [
        f"---\n{_metadata(container, base)}\n---",
        MARKER,
        f"# {repo.rsplit('/', maxsplit=1)[-1]}",
        _opening(base_name, manifest),
        f"## Load\n\n{_loading(container, repo)}",
        "## "
        f"Figures\n\n{_table(_figures(facts, base_name, baseline))}\n\n{_remarks(facts, baseline)}",
        f"## Verify\n\n{_verification(repo, facts)}",
        _licence(base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(container: Container, base: BaseModel | None) -> str:
    from huggingface_hub import ModelCardData

    manifest = container.manifest
    codecs = {
        plane.codec for record in manifest.tensors for plane in getattr(record, "planes", [])
    } - {"raw"}
    fields: dict[str, Any] = {
        "pipeline_tag": _pipeline_tag(container),
        **(base.card if base is not None else {}),
    }
    base_name = base.repo if base is not None else manifest.source.repo
    if base_name is not None:
        fields |= {"base_model": base_name, "base_model_relation": "quantized"}
    fields["license_link"] = _licence_link(fields.get("license_link"), base, manifest)
    # The Hub's class writes the YAML: it quotes names where that is needed.
    data = ModelCardData(
        library_name="transformers",
        tags=["codecllm", manifest.options.scheme, *sorted(codecs), *_code_tags(manifest)],
        **fields,
    )
    return str(data.to_yaml()).strip()


def _code_tags(manifest: Manifest) -> list[str]:
    return ["custom_code"] if CODE in manifest.required_features else []


def _licence_link(link: str | None, base: BaseModel | None, manifest: Manifest) -> str | None:
    """A link relative to the base's repository stays only where the container has that file too."""
    if link is None or base is None or "://" in link or manifest.file(link) is not None:
        return link
    return f"https://huggingface.co/{base.repo}/blob/main/{link}"


def _pipeline_tag(container: Container) -> str | None:
    record = container.manifest.file("config.json")
    if record is None:
        return None
    names = parse_config(container.read_side_file(record)).get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise SchemaError(
            "architectures is no list of names", file=record.name, got=ascii(names)[:80]
        )
    # Only the clear case: a wrong tag would give the Hub's page a wrong widget.
    return "text-generation" if names[0].endswith("ForCausalLM") else None


def _opening(base: str | None, manifest: Manifest) -> str:
    source = f"[{base}](https://huggingface.co/{base})" if base is not None else "A model"
    return (
        f"{source} in a codecllm container: {_SCHEMES[manifest.options.scheme]}. Weights are "
        "entropy-coded into ordinary "
        "safetensors files, every chunk with a checksum, and decoded when they are loaded. "
        "Without codecllm they do not load: "
        "transformers stops at a shape error."
    )


def _loading(container: Container, repo: str) -> str:
    has_tokenizer = any(container.manifest.file(name) is not None for name in _TOKENIZERS)
    lines = ["import codecllm, transformers"] if has_tokenizer else ["import codecllm"]
    lines += [f'model = codecllm.from_pretrained("{repo}")']
    lines += (
        ["tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)"]
        if has_tokenizer
        else []
    )
    text = "```python\n" + "\n".join(lines) + "\n```"
    if any(isinstance(record, Int8Tensor) for record in container.manifest.tensors):
        text += (
            '\n\n`resident="int8"` keeps the codes in memory: half the bytes of bf16, the same '
            "weights, and products that "
            "differ by the rounding of bf16 at most."
        )
    return text + _loading_remarks(container.manifest)


def _loading_remarks(manifest: Manifest) -> str:
    """Returns paragraphs on code that a load runs.

    The quantizer of the source, the repository's own.
    """
    text = ""
    if manifest.source.quantization is not None:
        text += (
            f"\n\nThe source is quantized ({manifest.source.quantization}) and stays so: every "
            "tensor is its own, bit for bit, "
            "and transformers loads them with the quantizer of that method."
        )
    code = [record for record in manifest.files if record.name.endswith(CODE_SUFFIX)]
    if code:
        names = "\n".join(f"- {_file(record.name)}, sha256 `{record.sha256}`" for record in code)
        text += (
            "\n\n**This repository contains Python code** of the source's authors. It runs only "
            "if you pass "
            f"`trust_remote_code=True`; read it first.\n\n{names}"
        )
    return text


def _file(name: str) -> str:
    """Returns a file's name as code; as text where a character of it could end the code."""
    return f"`{name}`" if _PLAIN_NAME.fullmatch(name) else in_markdown(name)


def _figures(
    facts: dict[str, Any], base: str | None, baseline: Baseline | None
) -> Iterator[tuple[str, str]]:
    dtypes = ", ".join(facts["source_dtypes"])
    yield "weights", f"{facts['weights']:,}"
    yield f"source ({dtypes})", f"{facts['source_bytes']:,} bytes"
    yield "container (shards and manifest)", f"{facts['container_bytes']:,} bytes"
    yield "ratio", f"{facts['ratio']:.3f}x"
    yield "bits per weight, all counted", f"{facts['bits_per_weight']:.3f}"
    yield (
        "order-0 entropy of what is coded",
        f"{facts['entropy_bits_per_weight']:.3f} bits per weight",
    )
    schemes: dict[str, int] = {}
    for tensor in facts["tensors"]:
        schemes[tensor["scheme"]] = schemes.get(tensor["scheme"], 0) + 1
    yield "tensors", ", ".join(f"{count} {scheme}" for scheme, count in sorted(schemes.items()))
    agreement = baseline.agreement if baseline is not None else None
    if agreement is not None:
        # A figure that was not measured is left out, not shown as 0.
        shown = agreement.text or agreement
        if shown.mean_kl is not None:
            yield "mean KL(source, this), per token", f"{shown.mean_kl:.3g} nats"
        if shown.top1 is not None:
            yield "same most likely token as the source", f"{shown.top1:.2%}"
        if agreement.same_tokens is not None:
            yield "prompts with the source's greedy text", f"{agreement.same_tokens:.0%}"
        if agreement.cosine is not None:
            yield "smallest cosine with the source's hidden states", f"{agreement.cosine:.7f}"
    commit = facts["source"]["commit"]
    if base is not None and commit is not None:
        yield "source commit", f"`{commit}`"
    # Strings of a manifest may come from anyone and must not act as markup.
    writer = in_markdown(facts["writer"].get("codecllm", "?"))
    yield "container format", f"{facts['format_version']}, written by codecllm {writer}"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(
        ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def _remarks(facts: dict[str, Any], baseline: Baseline | None) -> str:
    ratio = "The ratio is source bytes / container bytes; tokenizer and configs are not counted."
    if baseline is None or baseline.kind == "none" or baseline.environment is None:
        return f"{ratio} No output of the model was recorded when it was converted."
    where = baseline.environment
    # Strings of a baseline may come from anyone, as those of a manifest.
    torch, transformers, device, dtype = (
        in_markdown(text) for text in (where.torch, where.transformers, where.device, where.dtype)
    )
    compared_on = f"{len(baseline.greedy) or len(baseline.hidden)} fixed prompts"
    if baseline.agreement is not None and baseline.agreement.text is not None:
        compared_on += (
            f" and, for KL and most likely tokens, {baseline.agreement.text.tokens} tokens of a "
            "fixed text"
        )
    return (
        f"{ratio} Source and container were compared on {compared_on} (torch {torch}, "
        f"transformers {transformers}, {device}, {dtype}); `{BASELINE_NAME}` holds prompts "
        "and outputs, and "
        "`codecllm verify` runs them again. That is a check that the container says what it said, "
        "not a benchmark of quality."
    )


def _verification(repo: str, facts: dict[str, Any]) -> str:
    return (
        f"```\ncodecllm verify {repo} \\\n  --manifest-sha256 {facts['manifest_sha256']}\n```\n\n"
        "The manifest's sha256 fixes every byte of the container; `codecllm.from_pretrained` "
        "takes it as "
        "`expected_manifest_sha256`."
    )


def _licence(base: BaseModel | None) -> str:
    if base is None or "license" not in base.card:
        return ""
    licence = in_markdown(str(base.card.get("license_name") or base.card["license"]))
    gating_note = (
        " Access to it is gated; its conditions hold for these weights too." if base.gated else ""
    )
    return (
        f"## Licence\n\nThat of the [base model](https://huggingface.co/{base.repo}): "
        f"{licence}.{gating_note}"
    )
