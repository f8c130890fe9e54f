"""KL against bits, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.formats.files import as_path, write_atomically
from codecllm.verifier.evaluation.evaluate import Evaluation

_SUFFIXES = (".png", ".svg", ".pdf")
_MARKS = {"container": "o-", "gguf": "s", "dequantized": "D", "folder": "^"}
"""How each kind is drawn."""


def check_plot(path: Path, inputs: Sequence[str | Path | None] = ()) -> None:
    """Makes sure that a plot can be drawn, before hours are spent on its data.

    Args:
        path: the picture's file.
        inputs: models and texts that are read for it.

    Raises:
        UsageError: the suffix is none of png, svg, pdf; or see `check_output`.
        UnsupportedEnvironmentError: matplotlib is not installed.
    """
    path = as_path(path, "plot")
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            "a plot is written as", got=path.suffix or str(path), expected=", ".join(_SUFFIXES)
        )
    check_output(path, "plot", inputs)
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise UnsupportedEnvironmentError(
            "plots need matplotlib: pip install 'codecllm[plot]'"
        ) from exc


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draws mean KL (logarithmic) against bits per weight of the layers.

    Each candidate has one mark, and a line joins containers. A candidate without any distance has
    no place on a logarithmic axis; it stands below the others and its label says 0.
    """
    check_plot(path)
    path = as_path(path, "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    # A third of the smallest value puts marks without any distance below the others.
    floor = (
        min((score.mean_kl for score in evaluation.scores if score.mean_kl > 0), default=1.0) / 3
    )
    for kind, mark in _MARKS.items():
        scores = sorted(
            (score for score in evaluation.scores if score.kind == kind),
            key=lambda s: s.layer_bits_per_weight,
        )
        places = [(score.layer_bits_per_weight, max(score.mean_kl, floor)) for score in scores]
        if scores:
            axes.plot(*zip(*places, strict=True), mark, label=kind, linewidth=0.8, markersize=5)
        for score, place in zip(scores, places, strict=True):
            label = Path(score.name).name.removesuffix(".gguf") + (
                "" if score.mean_kl > 0 else " (0)"
            )
            axes.annotate(label, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel("bits per weight of the layers' matrices, everything counted")
    axes.set_ylabel(f"KL(base || candidate) per token, nats ({evaluation.tokens} tokens)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())
