"""KL against bits, as a picture."""

from __future__ import annotations

from pathlib import Path

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.verifier.evaluation.evaluate import Evaluation

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Makes sure that a plot can be drawn, before hours are spent on its data.

    Raises:
        UsageError: the suffix is none of png, svg, pdf.
        UnsupportedEnvironmentError: matplotlib is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError("a plot is written as", got=path.suffix or str(path), expected=", ".join(_SUFFIXES))
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise UnsupportedEnvironmentError("plots need matplotlib: pip install 'codecllm[plot]'") from exc


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draws mean KL (logarithmic) against bits per weight of the layers, one mark per candidate."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    marks = {"container": "o", "gguf": "s", "folder": "^"}
    for kind, mark in marks.items():
        chosen = [score for score in evaluation.scores if score.kind == kind]
        if chosen:
            xs, ys = [s.layer_bits_per_weight for s in chosen], [max(s.mean_kl, 1e-9) for s in chosen]
            axes.plot(xs, ys, mark, label=kind)
        for score in chosen:
            place = (score.layer_bits_per_weight, max(score.mean_kl, 1e-9))
            axes.annotate(Path(score.name).name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the layers' matrices, everything counted")
    axes.set_ylabel(f"KL(base || candidate) per token, nats ({evaluation.tokens} tokens)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
