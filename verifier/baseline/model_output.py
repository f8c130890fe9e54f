"""Runs a model on the fixed prompts: greedy tokens, logits, or the first output of an encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from codecllm.formats.errors import SchemaError
from codecllm.verifier.baseline.inference import repeatable_inference
from codecllm.verifier.baseline.prompts import (
    HIDDEN_SAMPLES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    TOP_TOKENS,
)
from codecllm.verifier.baseline.record import Environment, HiddenSamples, TopTokens

if TYPE_CHECKING:
    from codecllm.loader.hf.listed import ModelFiles


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt and its token ids."""

    text: str
    tokens: list[int]


class PromptCoder:
    """Text to tokens and back: the model's tokenizer, or arbitrary fixed ids where it has none."""

    def __init__(self, model: ModelFiles, config: Any) -> None:
        """Loads the tokenizer of a model's folder or of an opened container, if there is one.

        Raises:
            FormatError: a file of the container differs from the manifest.
        """
        from codecllm.loader.hf.folder import read_tokenizer

        self._vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        try:
            self._tokenizer = read_tokenizer(model)
        except SchemaError:  # there is none, or none that transformers can read
            self._tokenizer = None

    def prompts(self, texts: Sequence[str] | None = None) -> list[PromptTokens]:
        """Returns prompts as tokens; fixed ids replace those that leave the model's vocabulary.

        Args:
            texts: None takes the fixed prompts, cut to one length, so that they make one batch.
        """
        prompts = [
            PromptTokens(text, self._prompt_tokens(text, number))
            for number, text in enumerate(PROMPTS if texts is None else texts)
        ]
        if texts is not None:
            return prompts
        length = min(PROMPT_TOKENS, *(len(prompt.tokens) for prompt in prompts))
        return [PromptTokens(prompt.text, prompt.tokens[:length]) for prompt in prompts]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text; none without a tokenizer or outside the vocabulary."""
        from codecllm.loader.hf.folder import encoded

        if self._tokenizer is None:
            return []
        try:
            tokens = [int(token) for token in encoded(self._tokenizer, text)["input_ids"]]
        except Exception:  # one that transformers made up for a folder without tokenizer files
            return []
        return tokens if not self._vocabulary or max(tokens, default=0) < self._vocabulary else []

    def encode_apart(self, text: str) -> tuple[list[int], list[int]]:
        """Returns the start token that the tokenizer gives a text, or nothing, and the others."""
        from codecllm.loader.hf.folder import start_of

        tokens = self.encode(text)
        start = start_of(self._tokenizer, tokens)
        return start, tokens[len(start) :]

    def windows(self, text: str, count: int, length: int) -> list[list[int]]:
        """Returns pieces of a text, evenly spread, each behind the tokenizer's start token.

        Args:
            text: in any language.
            count: number of pieces.
            length: tokens of each, the start token among them.

        Returns:
            None of them without a tokenizer, outside the vocabulary, or where the text is shorter.
        """
        start, ids = self.encode_apart(text)
        piece = length - len(start)
        if piece < 2 or len(ids) < count * piece:
            return []
        windows = list[list[int]]()
        for number in range(count):
            first = number * (len(ids) - piece) // (count - 1)
            windows.append(start + ids[first : first + piece])
        return windows

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, or an empty string without a tokenizer."""
        from codecllm.loader.hf.folder import decoded

        return "" if self._tokenizer is None else decoded(self._tokenizer, tokens)

    def _prompt_tokens(self, text: str, number: int) -> list[int]:
        tokens = self.encode(text)
        if tokens:
            return tokens
        # A prime spreads the ids over the vocabulary. They are the same in every release, so that
        # old records stay comparable.
        vocabulary = max(2, self._vocabulary)
        return [
            (7919 * (number + 1) * (position + 1)) % vocabulary for position in range(PROMPT_TOKENS)
        ]


def is_batch(prompts: Sequence[PromptTokens]) -> bool:
    """Whether prompts can run as one batch: all have one length, so none needs padding.

    Padding changes the output of models that keep a state, and of some that count positions.
    """
    return len({len(prompt.tokens) for prompt in prompts}) == 1


def _batches(prompts: Sequence[PromptTokens], together: bool) -> list[slice]:
    """Returns the parts in which prompts run: one for all where `together`, else one for each."""
    if together:
        return [slice(0, len(prompts))]
    return [slice(number, number + 1) for number in range(len(prompts))]


def all_greedy_tokens(
    model: Any, prompts: Sequence[PromptTokens], together: bool
) -> list[list[int]]:
    """Returns `greedy_tokens` of prompts that run as one batch (`together`) or each alone."""
    return [
        tokens
        for part in _batches(prompts, together)
        for tokens in greedy_tokens(model, prompts[part])
    ]


def all_logits(
    model: Any, prompts: Sequence[PromptTokens], texts: Sequence[list[int]], together: bool
) -> list[torch.Tensor]:
    """Returns `continuation_logits` along `texts`; see `all_greedy_tokens`."""
    return [
        logits
        for part in _batches(prompts, together)
        for logits in continuation_logits(model, prompts[part], texts[part])
    ]


def all_first_outputs(
    model: Any, prompts: Sequence[PromptTokens], together: bool
) -> list[torch.Tensor]:
    """Returns `first_output` of prompts; see `all_greedy_tokens`."""
    return [
        values
        for part in _batches(prompts, together)
        for values in first_output(model, prompts[part])
    ]


SMALL_MODEL = 1 << 28
"""Parameters up to which a model runs in one thread."""


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """Runs a small model in one thread inside the block.

    Its products take microseconds. More threads gain little then, and on a busy machine they wait
    for each other many times as long as they compute.
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


def greedy_tokens(model: Any, batch: Sequence[PromptTokens]) -> list[list[int]]:
    """Returns for each prompt the 32 tokens that the model finds most likely one after another.

    The prompts have one length and run as one batch.

    The model's generation config is left out. Generation does not stop at an end-of-text token:
    each prompt always checks as many tokens.
    """
    from transformers import GenerationConfig

    own_config = model.generation_config
    plain = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        bos_token_id=own_config.bos_token_id,
        pad_token_id=own_config.pad_token_id,
        decoder_start_token_id=own_config.decoder_start_token_id,
    )
    ids = _ids(model, batch)
    # `generate` fills unset values of its argument from the model's own config: both are replaced.
    model.generation_config = plain
    try:
        with repeatable_inference(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = own_config
    prompt_length = 1 if model.config.is_encoder_decoder else ids.shape[1]
    continuations: list[list[int]] = out[:, prompt_length:].tolist()
    return continuations


def continuation_logits(
    model: Any, batch: Sequence[PromptTokens], continuations: Sequence[list[int]]
) -> list[torch.Tensor]:
    """Returns for each prompt the teacher-forced logits: float32 [tokens, vocabulary].

    Args:
        model: one that generates.
        batch: prompts of one length.
        continuations: a text for each, all of one length.
    """
    ids = _ids(model, batch)
    texts = torch.tensor(list(continuations), device=model.device)
    with repeatable_inference(model):
        if model.config.is_encoder_decoder:
            start = model.generation_config.decoder_start_token_id
            first = torch.full_like(texts[:, :1], start if start is not None else 0)
            decoder_ids = torch.cat([first, texts[:, :-1]], 1)
            logits = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        else:
            whole = torch.cat([ids, texts], 1)
            logits = model(input_ids=whole, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    return list(logits.to("cpu", torch.float32))


def forced_logits(model: Any, tokens: list[int], steps: int) -> torch.Tensor:
    """Returns the float32 logits [1, vocabulary] after a text, whose last `steps` go in singly.

    This is the model's own generation with prescribed tokens, so that the caches and states that
    the model keeps from token to token are used here too. Of an encoder and decoder the encoder is
    given all tokens and the decoder the last of them.

    Args:
        model: one that generates.
        tokens: the text, longer than `steps`.
        steps: how many tokens are generated, from 1.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    own_config = model.generation_config
    ids = torch.tensor([tokens], device=model.device)
    count = steps + 1
    start = ids[:, :-steps]
    next_tokens = [*tokens[len(tokens) - steps :], tokens[-1]]
    plain = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        bos_token_id=own_config.bos_token_id,
        pad_token_id=own_config.pad_token_id,
        decoder_start_token_id=own_config.decoder_start_token_id,
    )
    coder = model.config.is_encoder_decoder
    # A decoder of its own starts from its start token, and does not repeat the prompt.
    first = 1 if coder else start.shape[1]

    def say(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only_next = torch.full_like(scores, -float("inf"))
        only_next[:, next_tokens[so_far.shape[1] - first]] = 0
        return only_next

    model.generation_config = plain
    try:
        prompt_ids = ids if coder else start
        out = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=plain,
            logits_processor=LogitsProcessorList([say]),
        )
    finally:
        model.generation_config = own_config
    result: torch.Tensor = out.logits[-1].to("cpu", torch.float32)
    return result


def first_output(model: Any, batch: Sequence[PromptTokens]) -> list[torch.Tensor]:
    """Returns for each prompt the first output of a model that does not generate, in float32.

    That is its last hidden state or its logits. The prompts have one length.
    """
    with repeatable_inference(model):
        output = model(input_ids=_ids(model, batch))
    return list(next(iter(output.values())).to("cpu", torch.float32))


def _ids(model: Any, batch: Sequence[PromptTokens]) -> torch.Tensor:
    return torch.tensor([prompt.tokens for prompt in batch], device=model.device)


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
    """Returns the 16 best tokens at each position of float32 logits [positions, vocabulary]."""
    best = torch.log_softmax(logits, -1).topk(min(TOP_TOKENS, logits.shape[-1]), -1)
    return [
        TopTokens(tokens=tokens, logprobs=[round(value, 6) for value in values])
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def mean_kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the mean KL(base || other) in nats of float32 logits [positions, vocabulary]."""
    if not base.shape[0]:
        return 0.0
    # float64: the divergence is a small sum of a hundred thousand terms of both signs.
    p = torch.log_softmax(base.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def top1_agreement(base: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the share of positions at which logits [positions, vocabulary] agree on the best."""
    return float((base.argmax(-1) == other.argmax(-1)).double().mean()) if base.shape[0] else 1.0


def recorded_kl(record: list[TopTokens], logits: torch.Tensor) -> torch.Tensor:
    """Returns KL(record || logits) in nats per position, with one event for unrecorded tokens.

    Merging events never makes a divergence larger, so this is a lower bound of the whole one.
    """
    q_all = torch.log_softmax(logits.double(), -1)
    result = torch.zeros(len(record), dtype=torch.float64)
    for position, top in enumerate(record):
        p = torch.tensor(top.logprobs, dtype=torch.float64)
        q = q_all[position, torch.tensor(top.tokens)]
        # Recorded logarithms are rounded, so the probabilities may add up to more than 1, and a
        # negative rest has no logarithm.
        p_rest = (1 - p.exp().sum()).clamp_min(1e-12)
        q_rest = (1 - q.exp().sum()).clamp_min(1e-12)
        result[position] = (p.exp() * (p - q)).sum() + p_rest * (p_rest / q_rest).log()
    return result


def environment(model: Any) -> Environment:
    """Returns the properties that the output may depend on besides the weights."""
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
