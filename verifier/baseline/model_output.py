"""Runs a model on the fixed prompts: greedy tokens, logits along a continuation, or the first output of an encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codecllm.verifier.baseline.prompts import HIDDEN_SAMPLES, NEW_TOKENS, PROMPTS, TOP_TOKENS
from codecllm.verifier.baseline.record import Environment, HiddenSamples, TopTokens


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt and its token ids."""

    text: str
    tokens: list[int]


class PromptCoder:
    """Text to tokens and back: the model's own tokenizer, or arbitrary fixed ids where it has none."""

    def __init__(self, folder: Path, config: Any) -> None:
        """Loads the tokenizer of `folder`, if there is a usable one."""
        from codecllm.loader.hf.folder import read_tokenizer

        self._vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        try:
            self._tokenizer = read_tokenizer(folder)
        except Exception:  # transformers raises whatever its many tokenizer classes happen to raise
            self._tokenizer = None

    def prompts(self, texts: Sequence[str] = PROMPTS) -> list[PromptTokens]:
        """Returns prompts (the fixed ones) as tokens; one whose ids leave the model's vocabulary is replaced by fixed ids."""
        return [
            PromptTokens(text, self._prompt_tokens(text, number))
            for number, text in enumerate(texts)
        ]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, or none without a tokenizer or where they leave the model's vocabulary."""
        if self._tokenizer is None:
            return []
        try:
            tokens = [int(token) for token in self._tokenizer(text)["input_ids"]]
        except Exception:  # one that transformers made up for a folder without tokenizer files
            return []
        return tokens if not self._vocabulary or max(tokens, default=0) < self._vocabulary else []

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, or an empty string without a tokenizer."""
        return (
            ""
            if self._tokenizer is None
            else str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        )

    def _prompt_tokens(self, text: str, number: int) -> list[int]:
        tokens = self.encode(text)
        if tokens:
            return tokens
        vocabulary = max(2, self._vocabulary)
        return [
            (7919 * (number + 1) * (position + 1)) % vocabulary for position in range(8 + number)
        ]


SMALL_MODEL = 1 << 25
"""Parameters up to which a model runs in one thread."""


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """Runs a small model in one thread inside the block.

    Its products take microseconds. More threads then spend their time waiting for each other, and
    on a busy machine many times that of the products.
    """
    threads = torch.get_num_threads()
    if sum(value.numel() for value in model.parameters()) <= SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generates(model: Any) -> bool:
    """Whether the baseline of a model is its greedy continuation."""
    return bool(hasattr(model, "can_generate") and model.can_generate())


def greedy_tokens(model: Any, prompt: PromptTokens) -> list[int]:
    """Returns the 32 tokens that the model finds most likely one after another, whatever its generation config says.

    It does not stop at an end-of-text token: each prompt always checks as many tokens.
    """
    from transformers import GenerationConfig

    given = model.generation_config
    plain = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        bos_token_id=given.bos_token_id,
        pad_token_id=given.pad_token_id,
        decoder_start_token_id=given.decoder_start_token_id,
    )
    ids = torch.tensor([prompt.tokens], device=model.device)
    model.generation_config = plain
    try:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = given
    tokens: list[int] = out[0].tolist()
    return tokens[1:] if model.config.is_encoder_decoder else tokens[len(prompt.tokens) :]


def continuation_logits(model: Any, prompt: PromptTokens, continuation: list[int]) -> torch.Tensor:
    """Returns the float32 logits [len(continuation), vocabulary] that predict each token of a continuation, teacher-forced."""
    device = model.device
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = model.generation_config.decoder_start_token_id
            forced = torch.tensor(
                [[start if start is not None else 0, *continuation[:-1]]], device=device
            )
            logits = model(
                input_ids=torch.tensor([prompt.tokens], device=device), decoder_input_ids=forced
            ).logits[0]
        else:
            ids = torch.tensor([[*prompt.tokens, *continuation]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1]
    result: torch.Tensor = logits.to("cpu", torch.float32)
    return result


def forced_logits(model: Any, tokens: list[int], steps: int) -> torch.Tensor:
    """Returns the float32 logits [1, vocabulary] after the last token of a text, whose last `steps` go in one at a time.

    This is the model's own generation, told what to say: whatever it keeps from token to token, it keeps here too. Of an
    encoder and decoder the encoder is given all tokens and the decoder the last of them.

    Args:
        model: one that generates.
        tokens: the text, longer than `steps`.
        steps: how many tokens are generated, from 1.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    given, ids = model.generation_config, torch.tensor([tokens], device=model.device)
    count, start = steps + 1, ids[:, :-steps]
    told = [*tokens[len(tokens) - steps :], tokens[-1]]
    plain = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        bos_token_id=given.bos_token_id,
        pad_token_id=given.pad_token_id,
        decoder_start_token_id=given.decoder_start_token_id,
    )
    coder = model.config.is_encoder_decoder
    first = 1 if coder else start.shape[1]

    def say(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -float("inf"))
        forced[:, told[so_far.shape[1] - first]] = 0
        return forced

    model.generation_config = plain
    try:
        shown = ids if coder else start
        out = model.generate(
            shown,
            attention_mask=torch.ones_like(shown),
            generation_config=plain,
            logits_processor=LogitsProcessorList([say]),
        )
    finally:
        model.generation_config = given
    result: torch.Tensor = out.logits[-1].to("cpu", torch.float32)
    return result


def first_output(model: Any, prompt: PromptTokens) -> torch.Tensor:
    """Returns the first output of a model that does not generate (last hidden state, or logits), as float32."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([prompt.tokens], device=model.device))
    result: torch.Tensor = next(iter(output.values())).to("cpu", torch.float32)
    return result


def tensor_sha256(values: torch.Tensor) -> str:
    """Returns the sha256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def sampled(values: torch.Tensor) -> HiddenSamples:
    """Returns digest, shape, root mean square and evenly spaced values of a float32 tensor."""
    flat = values.reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(HIDDEN_SAMPLES, flat.numel())).long()
    return HiddenSamples(
        sha256=tensor_sha256(values),
        shape=list(values.shape),
        rms=float(flat.double().square().mean().sqrt()),
        samples=[float(value) for value in flat[places]],
    )


def top_tokens(logits: torch.Tensor) -> list[TopTokens]:
    """Returns the 16 most likely tokens at each position of float32 logits [positions, vocabulary]."""
    best = torch.log_softmax(logits, -1).topk(min(TOP_TOKENS, logits.shape[-1]), -1)
    return [
        TopTokens(tokens=tokens, logprobs=[round(value, 6) for value in values])
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def mean_kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the mean over positions of KL(base || other) in nats; both float32 logits [positions, vocabulary]."""
    if not base.shape[0]:
        return 0.0
    p, q = torch.log_softmax(base.double(), -1), torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def top1_agreement(base: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the share of positions at which both logits [positions, vocabulary] have the same largest entry."""
    return float((base.argmax(-1) == other.argmax(-1)).double().mean()) if base.shape[0] else 1.0


def recorded_kl(record: list[TopTokens], logits: torch.Tensor) -> torch.Tensor:
    """Returns KL(record || logits) per position, over the recorded tokens and one event for all others, in nats.

    Merging events never makes a divergence larger, so this is a lower bound of the whole one.
    """
    q_all = torch.log_softmax(logits.double(), -1)
    result = torch.zeros(len(record), dtype=torch.float64)
    for position, top in enumerate(record):
        p = torch.tensor(top.logprobs, dtype=torch.float64)
        q = q_all[position, torch.tensor(top.tokens)]
        p_rest = (1 - p.exp().sum()).clamp_min(1e-12)
        q_rest = (1 - q.exp().sum()).clamp_min(1e-12)
        result[position] = (p.exp() * (p - q)).sum() + p_rest * (p_rest / q_rest).log()
    return result


def environment(model: Any) -> Environment:
    """Returns what the output may depend on besides the weights."""
    import transformers

    return Environment(
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", None)),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )
