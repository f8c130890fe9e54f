"""Bits at equal quality beside llama.cpp, bitsandbytes and HQQ.

The model is SmolLM2-135M with synthetic low bits (demo/models.py).


Every tool quantizes the same linear layers; embeddings and norms stay as they are. One `codecllm
eval` run per text scores all of them against the bf16 source. `--json` keeps every figure.
docs/quality-peers.md explains them and names the packages.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.others import llama_cpp, quantizers
from codecllm.calibrator import calibrate
from codecllm.converter import ConvertOptions, ParamsChoice, Rate, convert_model
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.quality import DEFAULT_CALIBRATION, quantized_tensors
from demo.models import smollm2_gguf, smollm2_realistic

ROOT = Path("benchmarks/out/quality")
SECOND_TEXT = Path(__file__).parent / "second_text.txt"
BITS = (2.3, 2.5, 2.8, 3.0, 3.3, 4.1, 5.0, 5.9, 7.0, 7.6)
DEFAULT, REFINED, SAME_TEXT = "ours-default", "ours-refined", "ours-text"
"""Prefixes of our containers' names: default, `--refine`, calibrated on the imatrix text."""

CALIBRATION = (8, 128)
"""Sequences that the model itself writes, and the tokens of each."""

KINDS = {
    "Q8_0": ("Q8_0", False),
    "Q6_K": ("Q6_K", False),
    "Q5_K_M": ("Q5_K_M", False),
    "Q4_K_M": ("Q4_K_M", False),
    "Q5_K": ("Q5_K_S", True),
    "Q4_K": ("Q4_K_S", True),
    "IQ4_XS": ("IQ4_XS", False),
}
"""Name in the table -> llama-quantize's name, and whether all matrices get it (`--pure`)."""

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
        ours: our bits at the same KL; None outside of the measured range.
        refined: the same with `--refine`; None for those given an importance matrix.
        goal: per cent of bits that were to be saved; None for those given an importance matrix.
    """

    name: str
    bits: float
    kl: float
    kl_99: float
    top1: float
    ours: float | None
    refined: float | None
    goal: float | None

    @property
    def saved(self) -> float | None:
        """Per cent of the peer's bits."""
        return None if self.ours is None else 100 * (1 - self.ours / self.bits)

    @property
    def saved_refined(self) -> float | None:
        """The same with `--refine`."""
        return None if self.refined is None else 100 * (1 - self.refined / self.bits)


def calibration_text(base: Path, out: Path) -> Path:
    """Writes a seeded text of the model, from its first token on; returns the file."""
    if out.exists():
        return out
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sequences, tokens = CALIBRATION
    torch.manual_seed(0)
    start = torch.full((sequences, 1), tokenizer.bos_token_id)
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


def make_llama_cpp(base: Path, calibration: Path) -> list[Path]:
    """Quantizes with llama.cpp: with or without importance matrix, and joined rows."""
    tool = llama_cpp.LlamaCpp(llama_cpp.build(), smollm2_gguf())
    plain_gguf, joined_gguf = ROOT / "bf16.gguf", ROOT / "joined.gguf"
    importance = {
        plain_gguf: ROOT / "importance.gguf",
        joined_gguf: ROOT / "importance-joined.gguf",
    }
    if not importance[joined_gguf].exists():
        tool.write_model(base, plain_gguf)
        tool.write_model(base, joined_gguf, joined=True)
        tool.importance(plain_gguf, calibration, importance[plain_gguf], CALIBRATION[1])
        llama_cpp.join_importance(importance[plain_gguf], importance[joined_gguf])
    candidates = []
    for name, (kind, pure) in KINDS.items():
        for source in (plain_gguf, joined_gguf):
            for with_importance in (False, True):
                if name == "Q8_0" and (with_importance or source is joined_gguf):
                    continue  # its blocks are of 32, and it has no use for importance
                if name.endswith("_M") and source is joined_gguf:
                    continue  # the mixtures are judged as users get them
                title = (
                    name
                    + ("-joined" if source is joined_gguf else "")
                    + ("-imatrix" if with_importance else "")
                )
                file = ROOT / f"{title}.gguf"
                if not file.exists():
                    tool.quantize(
                        source,
                        file,
                        kind,
                        pure=pure,
                        importance=importance[source] if with_importance else None,
                    )
                    print(title, llama_cpp.stored_types(file), file=sys.stderr, flush=True)
                folder = ROOT / title
                if source is joined_gguf and not folder.exists():
                    quantizers.write_dequantized(base, folder, llama_cpp.read_matrices(file, base))
                candidates.append(folder if source is joined_gguf else file)
    return candidates


def make_others(base: Path) -> list[Path]:
    """Quantizes with bitsandbytes and HQQ; returns the candidates."""
    tools = {
        "NF4": lambda: quantizers.nf4(double=False),
        "NF4-double": lambda: quantizers.nf4(double=True),
        "HQQ": lambda: quantizers.hqq(axis=1),
        "HQQ-axis0": lambda: quantizers.hqq(axis=0),
    }
    for name, tool in tools.items():
        if not (ROOT / name).exists():
            quantize = tool()
            layers = quantizers.linear_layers(base)
            quantizers.write_dequantized(
                base, ROOT / name, {title: quantize(matrix) for title, matrix in layers.items()}
            )
    return [ROOT / name for name in tools]


def make_ours(base: Path, calibration: Path, codec: str) -> list[Path]:
    """Converts at each rate: by default, refined, and calibrated on the imatrix text."""
    options: dict[str, Any] = {"codec": codec, "exclude": ("*embed_tokens*",), "force": True}
    own_run = same = feedback = None
    candidates = []
    for title, bits in product((DEFAULT, REFINED, SAME_TEXT), BITS):
        candidates.append(out := ROOT / f"{title}-{bits:g}")
        if (out / "codecllm.json").exists():
            continue
        with SourceModel(base) as source:
            if title == SAME_TEXT:
                calibration_run = same = same or calibrate(source, str(calibration))
            else:
                names = quantized_tensors(source, ConvertOptions(**options))
                calibration_run = own_run = own_run or calibrate(
                    source, DEFAULT_CALIBRATION, refined=names
                )
            refine = title == REFINED
            if refine:
                feedback = feedback or Feedback(calibration_run.products)
            rate = Rate(bits=bits, calibrate=calibration_run.record.kind, refine=refine)
            rate_options = ConvertOptions(rate=rate, **options)
            fitted_steps = fit(
                source, rate_options, calibration_run.statistics, feedback if refine else None
            )
            choice = ParamsChoice(fitted_steps, rate, calibration_run.record)
            convert_model(source, out, rate_options, choice=choice)
    return candidates


def table(evaluation: dict[str, Any]) -> list[Row]:
    """Returns the peers of an evaluation with our bits at their KL, interpolated in log KL.

    Peers that were given an importance matrix are compared with ours calibrated on the same text,
    all others with the default.
    """
    scores = evaluation["scores"]
    containers = [score for score in scores if score["kind"] == "container"]
    curves = {
        title: sorted(
            (s["mean_kl"], s["layer_bits_per_weight"])
            for s in containers
            if Path(s["name"]).name.startswith(title)
        )
        for title in (DEFAULT, REFINED, SAME_TEXT)
    }
    rows = []
    for score in scores:
        if score["kind"] != "container":
            name = Path(score["name"]).name.removesuffix(".gguf")
            with_importance = "imatrix" in name
            figures = (
                score["layer_bits_per_weight"],
                score["mean_kl"],
                score["kl_99"],
                score["top1"],
            )
            goal = None if with_importance else _GOALS.get(name.removesuffix("-joined"), _GOAL)
            ours = _bits_at(curves[SAME_TEXT if with_importance else DEFAULT], score["mean_kl"])
            refined_bits = None if with_importance else _bits_at(curves[REFINED], score["mean_kl"])
            rows.append(Row(name, *figures, ours, refined_bits, goal))
    return rows


def _bits_at(curve: list[tuple[float, float]], kl: float) -> float | None:
    for (low_kl, more), (high_kl, fewer) in pairwise(curve):
        if low_kl <= kl <= high_kl:
            part = math.log(kl / low_kl) / math.log(high_kl / low_kl)
            return more + part * (fewer - more)
    return None


def print_table(evaluation: dict[str, Any], rows: list[Row]) -> None:
    """Prints Markdown: the peers, then our containers."""
    print(
        "\n| peer | bits | KL | 99 % | top-1 | ours at that KL | saved | goal | refined | saved |"
    )
    print("|---" * 10 + "|")
    for row in rows:
        saved_share = "" if row.saved is None else f"{row.saved:.1f} %"
        goal = "" if row.goal is None else f"{row.goal:.0f} %"
        if row.goal is not None and row.saved is not None:
            goal += ", met" if row.saved >= row.goal else ", missed"
        bits = "outside" if row.ours is None else f"{row.ours:.3f}"
        more = "" if row.refined is None else f"{row.refined:.3f} | {row.saved_refined:.1f} %"
        figures = f"{row.bits:.3f} | {row.kl:.5f} | {row.kl_99:.4f} | {row.top1:.2%}"
        print(f"| {row.name} | {figures} | {bits} | {saved_share} | {goal} | {more or ' | '} |")
    print("\n| ours | bits | KL | 99 % | top-1 |\n|---|---|---|---|---|")
    for score in evaluation["scores"]:
        if score["kind"] == "container":
            figures = f"{score['mean_kl']:.5f} | {score['kl_99']:.4f} | {score['top1']:.2%}"
            print(
                f"| {Path(score['name']).name} | {score['layer_bits_per_weight']:.3f} | {figures} |"
            )


def _run(*command: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.strip()[-2000:]}")
    return process.stdout


def main() -> None:
    """Makes the missing candidates, evaluates all, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="draw KL against bits on the first text")
    options = parser.parse_args()
    ROOT.mkdir(parents=True, exist_ok=True)
    base = smollm2_realistic()
    calibration = calibration_text(base, ROOT / "calibration.txt")
    candidates = make_llama_cpp(base, calibration) + make_others(base)
    candidates += make_ours(base, calibration, options.codec)
    results = {}
    for title, text, tokens in zip(
        ("built-in", "second"), ([], ["--text", str(SECOND_TEXT)]), options.tokens, strict=True
    ):
        plot = ["--plot", str(options.plot)] if options.plot and not text else []
        command = [
            "codecllm",
            "eval",
            str(base),
            *map(str, candidates),
            "--tokens",
            str(tokens),
            "--json",
            *text,
            *plot,
        ]
        evaluation = json.loads(_run(*command))
        rows = table(evaluation)
        results[title] = {
            "evaluation": evaluation,
            "rows": [
                asdict(row) | {"saved": row.saved, "saved_refined": row.saved_refined}
                for row in rows
            ],
        }
        print(f"\n{title} text, {evaluation['tokens']} tokens")
        print_table(evaluation, rows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
