"""`baseline.json`: output of the source and the converted model for fixed prompts, and where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codecllm.formats.errors import SchemaError
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.formats.strict_json import parse_json_object

# The file may come from a stranger: the bounds keep it from filling the memory.
MAX_BYTES = 64 << 20
MAX_TOKENS = 1 << 16
Kind = Literal["greedy", "hidden", "none"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS)]


class _Record(BaseModel):
    # Unknown fields are refused: an older reader must not pass a record that it half understands.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Environment(_Record):
    """The properties that the output of a model may depend on besides its weights."""

    torch: str
    transformers: str
    device: str
    dtype: str
    attention: str
    cpu_capability: str
    threads: int


class ModelTokens(_Record):
    """A model's greedy continuation; `logits_sha256` is over its teacher-forced float32 logits."""

    tokens: Tokens
    text: str
    logits_sha256: Sha256


class TopTokens(_Record):
    """The most likely tokens at one position and their natural log-probabilities, best first."""

    tokens: Tokens
    logprobs: list[float]


class GreedyPrompt(_Record):
    """One prompt: its tokens, both continuations, and distributions along the converted one."""

    text: str
    tokens: Tokens
    source: ModelTokens
    converted: ModelTokens
    top: list[TopTokens]


class HiddenSamples(_Record):
    """Digest, shape, root mean square and evenly spaced values of the first output (float32)."""

    sha256: Sha256
    shape: list[int]
    rms: float
    samples: list[float]


class HiddenPrompt(_Record):
    """One prompt of a model that does not generate."""

    text: str
    tokens: Tokens
    source: HiddenSamples
    converted: HiddenSamples


class TextAgreement(_Record):
    """Converted model against source on a fixed text, both given its tokens.

    Attributes:
        windows: pieces of the text, all of one length and in one batch.
        tokens: predicted in all of them.
        sha256: over the ids of all pieces one after another, as little-endian int64.
        top1: share of these tokens at which both models find the same one most likely.
        mean_kl: mean KL(source || converted) per token, in nats.
    """

    windows: int
    tokens: int
    sha256: Sha256
    top1: float
    mean_kl: float


class Agreement(_Record):
    """Converted model against source.

    `greedy` figures are taken along the source's continuation, `hidden` ones on the first outputs.

    Attributes:
        top1: share of positions at which both find the same token most likely (greedy).
        mean_kl: mean KL(source || converted) per position, in nats (greedy).
        same_tokens: share of prompts whose greedy continuations are equal (greedy).
        cosine: smallest cosine similarity over the prompts (hidden).
        text: figures on a fixed text (greedy, quantized).
        text_missing: why a quantized model that generates has none.
    """

    top1: float | None = None
    mean_kl: float | None = None
    same_tokens: float | None = None
    cosine: float | None = None
    text: TextAgreement | None = None
    text_missing: str | None = None


class Baseline(_Record):
    """The whole record.

    Attributes:
        format: always `codecllm-baseline`.
        version: always 1.
        kind: `greedy` for texts, `hidden` for first outputs, or `none`.
        reason: why `kind` is `none`.
        batched: whether all prompts ran as one batch; otherwise each ran alone.
        environment: where the converted model ran.
        agreement: converted model against source.
        greedy: the prompts of a model that generates.
        hidden: the prompts of another model.
    """

    format: Literal["codecllm-baseline"]
    version: Literal[1]
    kind: Kind
    reason: str | None = None
    batched: bool = False
    environment: Environment | None = None
    agreement: Agreement | None = None
    greedy: list[GreedyPrompt] = []
    hidden: list[HiddenPrompt] = []


def pack_baseline(baseline: Baseline) -> bytes:
    """Returns the bytes of `baseline.json`."""
    return (baseline.model_dump_json(exclude_none=True) + "\n").encode()


def parse_baseline(data: bytes) -> Baseline:
    """Reads `baseline.json`, strictly.

    Raises:
        SchemaError: it is not a baseline as this version writes it.
    """
    document = parse_json_object(data, file=BASELINE_NAME, max_bytes=MAX_BYTES)
    try:
        return Baseline.model_validate(document)
    except ValidationError as exc:
        # pydantic's own text takes several lines and shows the input; one error takes one line.
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SchemaError(f"{place}: {first['msg']}", file=BASELINE_NAME) from exc
