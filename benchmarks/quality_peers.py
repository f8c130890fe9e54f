"""Bits at equal quality beside llama.cpp, bitsandbytes and HQQ.

Models are SmolLM2-135M, and Qwen2.5-Coder-0.5B (`--model qwen`), both with synthetic low bits
(demo/models.py, benchmarks/quality/models.py). Every tool quantizes the same linear layers;
embeddings, head and norms stay as they are. All candidates are scored against the bf16 source in
one process; a run that was ended goes on where it was. The tables are Markdown, `--json` keeps
every figure. docs/quality-peers.md explains them and names the packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.others import llama_cpp, quantizers
from benchmarks.others.gguf_peers import GgufPeers
from benchmarks.quality import models
from benchmarks.quality.containers import convert_at
from benchmarks.quality.scores import Scores, bits_at, curve
from codecllm.quality import DEFAULT_CALIBRATION
from codecllm.verifier.evaluation.evaluate import Evaluation, Score
from codecllm.verifier.evaluation.plot import draw
from demo.models import smollm2_gguf

ROOT = Path("benchmarks/out/quality")
BITS = (2.3, 2.5, 2.8, 3.0, 3.3, 4.1, 5.0, 5.9, 7.0, 7.6)
DEFAULT, REFINED, SAME_TEXT = "ours-default", "ours-refined", "ours-text"
"""Prefixes of our containers' names: default, `--refine`, calibrated on the imatrix text."""

CALIBRATION = (8, 128)
"""Sequences that the model itself writes, and the tokens of each."""

TEMPLATES = {"smollm2": smollm2_gguf, "qwen": models.qwen_gguf}
"""Model -> the GGUF file whose vocabulary and settings llama.cpp's files get."""

_GOALS = {"Q8_0": 17.0, "Q6_K": 17.0}
_GOAL = 23.0
"""Per cent of bits to save at equal KL."""


@dataclass(frozen=True, slots=True)
class Row:
    """A peer on one text.

    Attributes:
        name: of the peer.
        bits: stored bits per weight of the linear layers.
        kl: mean KL per token, nats.
        kl_99: 99th percentile.
        top1: share of tokens with the same most likely successor.
        ours: our bits at the same KL, by prefix of our containers; None outside of their range.
        goal: per cent of bits that were to be saved; None for those given an importance matrix.
    """

    name: str
    bits: float
    kl: float
    kl_99: float
    top1: float
    ours: dict[str, float | None]
    goal: float | None

    def saved(self, title: str) -> float | None:
        """Returns the per cent of the peer's bits that ours of a prefix saves."""
        bits = self.ours[title]
        return None if bits is None else 100 * (1 - bits / self.bits)


def calibration_text(base: Path, out: Path) -> Path:
    """Writes a seeded text of the model, from its first token on; returns the file."""
    if out.exists():
        return out
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sequences, tokens = CALIBRATION
    torch.manual_seed(0)
    first = tokenizer.bos_token_id
    start = torch.full((sequences, 1), model.config.bos_token_id if first is None else first)
    drawing: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": None,
        "pad_token_id": tokenizer.eos_token_id,
    }
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, **drawing
    )
    out.write_text(
        "\n\n".join(tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)) + "\n",
        encoding="utf-8",
    )
    return out


def make_others(base: Path, out: Path) -> list[Path]:
    """Quantizes with bitsandbytes and HQQ, where they are installed; returns the candidates."""
    tools = {
        "NF4": lambda: quantizers.nf4(double=False),
        "NF4-double": lambda: quantizers.nf4(double=True),
        "HQQ": lambda: quantizers.hqq(axis=1),
        "HQQ-axis0": lambda: quantizers.hqq(axis=0),
    }
    made = []
    for name, tool in tools.items():
        if not (out / name).exists():
            try:
                quantize = tool()
            except ImportError as exc:
                print(f"{name} is left out: {exc}", file=sys.stderr, flush=True)
                continue
            layers = quantizers.linear_layers(base)
            quantizers.write_dequantized(
                base, out / name, {title: quantize(matrix) for title, matrix in layers.items()}
            )
        made.append(out / name)
    return made


def table(scores: dict[str, dict[str, Any]]) -> list[Row]:
    """Returns the peers on one text with our bits at their KL, interpolated in log KL.

    Args:
        scores: name of a candidate -> its score, as `Scores` keeps them.
    """
    curves = {title: curve(scores, title) for title in (DEFAULT, REFINED, SAME_TEXT)}
    rows = []
    for name, score in scores.items():
        if name.startswith(("ours-", "exl3-")):
            continue
        kl = score["mean_kl"]
        goal = None if "imatrix" in name else _GOALS.get(name.removesuffix("-joined"), _GOAL)
        ours = {title: bits_at(points, kl) for title, points in curves.items()}
        bits = score["layer_bits_per_weight"]
        rows.append(Row(name, bits, kl, score["kl_99"], score["top1"], ours, goal))
    return rows


def lines(texts: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Returns the tables in Markdown: peers without and with importance matrix, then ours.

    Args:
        texts: name of a text -> name of a candidate -> its score.
    """
    tables = [{row.name: row for row in table(scores)} for scores in texts.values()]
    first = tables[0]
    without = "KL{} | ours, bits | saved | `--refine`"
    text = [f"| peer | bits | {without.format('')} | {without.format(', 2nd text')} |"]
    text.append("|---" * 10 + "|")
    for name, row in first.items():
        if row.goal is not None:
            cells = [_against(each[name], DEFAULT) for each in tables]
            text.append(f"| {name} | {row.bits:.3f} | " + " | ".join(cells) + " |")
    with_matrix = "KL{} | same text, bits | saved | default | `--refine`"
    text += ["", f"| peer | bits | {with_matrix.format('')} | {with_matrix.format(', 2nd text')} |"]
    text.append("|---" * 12 + "|")
    for name, row in first.items():
        if row.goal is None:
            cells = [_against(each[name], SAME_TEXT) for each in tables]
            text.append(f"| {name} | {row.bits:.3f} | " + " | ".join(cells) + " |")
    text += ["", "| container | bits | KL | 99 % | top-1 | KL, 2nd text | 99 % | top-1 |"]
    text.append("|---" * 8 + "|")
    for name, score in sorted(next(iter(texts.values())).items()):
        if name.startswith("ours-"):
            text.append(
                f"| {name} | {score['layer_bits_per_weight']:.3f} | {_figures(texts, name)} |"
            )
    return text


def _against(row: Row, title: str) -> str:
    """Returns the cells of a peer on one text: its KL, our bits, and what is saved."""
    bits = row.ours[title]
    cells = [f"{row.kl:.4f}", "outside" if bits is None else f"{bits:.2f}"]
    mark = ""
    share = row.saved(title)
    if row.goal is not None and share is not None:
        mark = " ✓" if share >= row.goal else " ✗"
    cells.append(_share(share) + mark)
    if title == SAME_TEXT:
        cells.append(_share(row.saved(DEFAULT)))
    cells.append(_share(row.saved(REFINED)))
    return " | ".join(cells)


def _figures(texts: dict[str, dict[str, dict[str, Any]]], name: str) -> str:
    scores = [scores[name] for scores in texts.values()]
    return " | ".join(
        f"{score['mean_kl']:.4f} | {score['kl_99']:.3f} | {score['top1']:.1%}" for score in scores
    )


def _share(saved: float | None) -> str:
    return "" if saved is None else f"{saved:.1f} %"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(TEMPLATES), default="smollm2")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs=2,
        default=(1024, 512),
        help="of the built-in text, of the second",
    )
    parser.add_argument(
        "--codec", choices=("zstd", "rans"), default="zstd", help="of our containers"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, help="of our containers")
    parser.add_argument("--device", default="cpu", help="where models run")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of all candidates")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="draw KL against bits on the first text")
    return parser.parse_args()


def main() -> None:
    """Makes and scores the missing candidates, and prints the tables."""
    options = _options()
    out = options.out / options.model
    out.mkdir(parents=True, exist_ok=True)
    base = models.folder_of(options.model)
    calibration = calibration_text(base, out / "calibration.txt")
    scores = Scores(base, out / "scores.json", tokens=tuple(options.tokens), device=options.device)
    tool = llama_cpp.LlamaCpp(llama_cpp.build(), TEMPLATES[options.model]())
    for folders in GgufPeers(tool, base, out).folders(calibration, CALIBRATION[1], scores.names):
        scores.add(folders)
        for folder in folders:  # each is as large as the model
            shutil.rmtree(folder)
    scores.add(make_others(base, out))
    for title, kind, refine in (
        (DEFAULT, DEFAULT_CALIBRATION, False),
        (REFINED, DEFAULT_CALIBRATION, True),
        (SAME_TEXT, str(calibration), False),
    ):
        kinds: dict[str, Any] = {"kind": kind, "refine": refine}
        making = {"codec": options.codec, "device": options.device}
        scores.add(convert_at(base, out, title, options.bits, **kinds, **making))
    print("\n".join(lines(scores.texts)))
    rows = {text: [asdict(row) for row in table(of_text)] for text, of_text in scores.texts.items()}
    if options.json:
        options.json.write_text(
            json.dumps({"scores": scores.texts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    if options.plot:
        found = [Score(**score) for score in scores.texts["first"].values()]
        bare = Evaluation(str(base), 16.0, float("nan"), options.tokens[0], "float32", found)
        draw(bare, options.plot)


if __name__ == "__main__":
    main()
