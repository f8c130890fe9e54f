"""`baseline.json`: output of the source and the converted model for fixed prompts, and where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from codecllm.formats.errors import LimitError, SchemaError
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.formats.strict_json import parse_json_object

# The file may come from a stranger, and a verification runs every prompt of it: the bounds, many
# times what is written, keep it from filling the memory or going on for hours.
MAX_BYTES = 4 << 20
MAX_PROMPTS = 64
MAX_TOKENS = 512
MAX_VALUES = 1024
MAX_KEYS = 64
Kind = Literal["greedy", "hidden", "none"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_TOKENS), FailFast()
]
Values = Annotated[list[float], Field(max_length=MAX_VALUES), FailFast()]
Share = Annotated[float, Field(ge=0, le=1)]
# A sum of rounded terms may pass its bound a little.
Divergence = Annotated[float, Field(ge=-1e-6)]
Cosine = Annotated[float, Field(ge=-1.001, le=1.001)]


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
    logprobs: Values


class GreedyPrompt(_Record):
    """One prompt: its tokens, both continuations, and distributions along the converted one."""

    text: str
    tokens: Tokens
    source: ModelTokens
    converted: ModelTokens
    top: Annotated[list[TopTokens], Field(max_length=MAX_TOKENS), FailFast()]


class HiddenSamples(_Record):
    """Digest, shape, root mean square and evenly spaced values of the first output (float32)."""

    sha256: Sha256
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8), FailFast()]
    rms: Annotated[float, Field(ge=0)]
    samples: Values


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

    windows: Count
    tokens: Count
    sha256: Sha256
    top1: Share
    mean_kl: Divergence


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

    top1: Share | None = None
    mean_kl: Divergence | None = None
    same_tokens: Share | None = None
    cosine: Cosine | None = None
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
    greedy: Annotated[list[GreedyPrompt], Field(max_length=MAX_PROMPTS), FailFast()] = []
    hidden: Annotated[list[HiddenPrompt], Field(max_length=MAX_PROMPTS), FailFast()] = []


def pack_baseline(baseline: Baseline) -> bytes:
    """Returns the bytes of `baseline.json`."""
    return (baseline.model_dump_json(exclude_none=True) + "\n").encode()


def parse_baseline(data: bytes) -> Baseline:
    """Reads `baseline.json`, strictly.

    Raises:
        SchemaError: it is not a baseline as this version writes it, or it compares nothing.
        LimitError: it is many times as large as any that is written.
    """
    document = parse_json_object(data, file=BASELINE_NAME, max_bytes=MAX_BYTES)
    if len(document) > MAX_KEYS:  # pydantic would gather an error for each
        raise LimitError("too many fields", file=BASELINE_NAME, got=len(document))
    try:
        baseline = Baseline.model_validate(document)
    except ValidationError as exc:
        # pydantic's own text takes several lines and shows the input; one error takes one line.
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SchemaError(f"{place}: {first['msg']}", file=BASELINE_NAME) from exc
    _check_whole(baseline)
    return baseline


def _check_whole(baseline: Baseline) -> None:
    """Refuses a record without what its kind compares: a check of it would pass for nothing."""
    counts = {"greedy": len(baseline.greedy), "hidden": len(baseline.hidden)}
    for kind, count in counts.items():
        if (count > 0) != (kind == baseline.kind):
            raise SchemaError(
                f"{kind}: prompts do not go with the kind of the record",
                file=BASELINE_NAME,
                got=f"{count} prompts, kind {baseline.kind}",
            )
    if baseline.kind != "none" and baseline.environment is None:
        raise SchemaError("environment: field required", file=BASELINE_NAME)
    for number, prompt in enumerate(baseline.greedy):
        texts, places = len(prompt.converted.tokens), len(prompt.top)
        if texts != places or any(len(top.tokens) != len(top.logprobs) for top in prompt.top):
            raise SchemaError(
                f"greedy.{number}.top: not one probability for each token of each position",
                file=BASELINE_NAME,
                got=f"{places} positions",
                expected=texts,
            )
