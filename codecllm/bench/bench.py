"""Runs a container's residencies one after another, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from codecllm.formats.arguments.check import (
    MAX_COUNT,
    Check,
    check_arguments,
    check_fields,
    choice,
    instance,
    integer,
    optional,
    sequence,
    text,
)
from codecllm.formats.container import Container
from codecllm.formats.machine import MAX_WORKERS
from codecllm.hub import resolve

RESIDENTS = ("dense", "int8", "packed", "compressed")


_CHECKS: dict[str, Check] = {
    "residents": sequence(choice(RESIDENTS)),
    "device": text,
    "prompt_tokens": integer(1, MAX_COUNT),
    "new_tokens": integer(2, MAX_COUNT),
    "batch": integer(1, MAX_COUNT),
    "threads": optional(integer(1, MAX_WORKERS)),
}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured.

    Attributes:
        residents: residencies, in this order.
        source: folder or Hub id of the source, measured first as transformers loads it; or None.
        device: `auto`, `cpu`, or a GPU such as `cuda`.
        prompt_tokens: length of the prompt, 1 or more.
        new_tokens: tokens to generate, 2 or more.
        batch: texts at a time, 1 or more.
        threads: torch's threads; None leaves them to torch.
        revision: revision of a container on the Hub.

    Raises:
        UsageError: a field is of a wrong type or out of range.
    """

    residents: tuple[str, ...] = RESIDENTS
    source: str | None = None
    device: str = "cpu"
    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    threads: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, _CHECKS, "source", "revision")


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one residency.

    Attributes:
        name: its name, or `source`.
        error: why it could not be measured; the figures are then 0.
        load_seconds: time from the container to the model.
        weights_bytes: memory of the parameters.
        peak_bytes: most memory during load and generation, above that of the imports.
        first_token_seconds: time from the prompt to the first token.
        tokens_per_second: tokens of all texts after the first one.
        same_tokens: whether the text of the first prompt is that of the first row.
    """

    name: str
    error: str | None = None
    load_seconds: float = 0.0
    weights_bytes: int = 0
    peak_bytes: int = 0
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0
    same_tokens: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return asdict(self)


def bench(
    out: str | Path,
    options: BenchOptions,
    on_stage: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """Yields one row for the source, if it is given, and for each residency.

    Each runs in a process of its own, so that peaks of memory do not mix. Prompts are tokens at
    random, the same for all.

    Args:
        out: container folder or Hub id.
        options: see `BenchOptions`.
        on_stage: called with a sentence when a row begins.

    Raises:
        UsageError: an option is out of range, or no device.
        UnsupportedEnvironmentError: there is no such device.
        HubError: the container cannot be fetched.
        FormatError: its manifest is damaged, or a shard is missing or has another size.
        SourceError: the source cannot be read.
    """
    instance(BenchOptions)(options, "options")
    check_arguments(on_stage=on_stage)
    if options.device != "cpu":
        # Imported late: torch takes seconds. Here, because each process would fail by it.
        from codecllm.loader.places import device_of

        options = replace(options, device=str(device_of(options.device)))
    tell = on_stage or (lambda text: None)
    folder = str(resolve(out, revision=options.revision).folder)
    with Container(folder) as container:  # here: each process would fail by what is damaged
        for shard in container.manifest.shards:
            container.check_presence(shard)
    jobs = [(name, folder) for name in options.residents]
    if options.source is not None:
        jobs.insert(0, ("source", str(resolve(options.source, kind="source").folder)))
    first_tokens: list[int] | None = None
    for name, path in jobs:
        tell(f"bench: {name}")
        figures = _run(name, path, options)
        if "error" in figures:
            yield Row(name, error=figures["error"])
            continue
        tokens = figures.pop("tokens")
        first_tokens = first_tokens or tokens
        yield Row(name, same_tokens=tokens == first_tokens, **figures)


def _run(name: str, path: str, options: BenchOptions) -> dict[str, Any]:
    job = {
        "path": path,
        "is_source": name == "source",
        "resident": name,
        "device": options.device,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "batch": options.batch,
        "threads": options.threads,
    }
    command = [sys.executable, "-m", "codecllm.bench.run", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        # The last line of a traceback; nothing where the system ended it, mostly for memory.
        words = done.stderr.strip().splitlines()[-1:]
        return {"error": words[0][:300] if words else f"the process ended with {done.returncode}"}
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures
