"""Makes the containers of `conformance/`: `python -m tests.conformance.make`.

They are kept as bytes: those of a released version of the format are never made again, so that each
later reader is tested against the same ones. `--add` makes only the ones that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codecllm.converter import ParamsChoice, Rate, convert
from codecllm.converter.plan.tensor_plan import ParamsProvider
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.container import Container
from codecllm.formats.manifest.records import Calibration
from codecllm.formats.reference import read_tensor_bytes
from tests import tampering
from tests.conformance import accepted
from tests.conformance.faults import all_faults
from tests.golden import test_golden
from tests.malformed import builders
from tests.sources import bf16, write_sharded_source, write_source
from tests.stepped import make_steps
from tests.unit.formats.spec_example import make_example
from tests.unit.formats.spec_rules import spec_rules

ROOT = Path(__file__).resolve().parents[2] / "conformance"
GOOD, BAD = ROOT / "good", ROOT / "bad"
EXPECTED = "expected.json"
BASES = ("plain", "flags", "rans", "columns")


def good_containers() -> dict[str, Callable[[Path], Path]]:
    """Returns makers of the good containers by name; each takes a scratch folder."""
    return {
        "example": make_example,
        "lossless": lambda base: _converted(base, _every_dtype(), scheme="lossless"),
        "lossless-rans": lambda base: _converted(
            base, _some_dtypes(), scheme="lossless", codec="rans"
        ),
        "int8": lambda base: _converted(base, _weights()),
        "int8-columns": lambda base: _converted(base, _weights(), choice=_rated(_steps(0.3))),
        "int8-columns-rans": lambda base: _converted(
            base, _weights(), choice=ParamsChoice(_steps(0.3)), codec="rans"
        ),
        "int8-wide": lambda base: _converted(base, _weights(), choice=ParamsChoice(_steps(0.012))),
        "int8-wide-rans": lambda base: _converted(
            base, _weights(), choice=ParamsChoice(_steps(0.012)), codec="rans"
        ),
        "shards": _shards,
        "quantized": test_golden.make_quantized,
        **{
            name: lambda base, change=change: _changed(base, change)
            for name, change in accepted.CHANGES.items()
        },
    }


def _converted(base: Path, tensors: dict[str, Any], **options: Any) -> Path:
    source = write_source(base / "source", tensors, {"model_type": "gpt2"})
    convert(source, base / "container", include=("*",), **options)
    return base / "container"


def _every_dtype() -> dict[str, Any]:
    """A tensor of every dtype that `lossless` takes, a scalar, and one without elements."""
    return test_golden._lossless_tensors()


def _some_dtypes() -> dict[str, Any]:
    names = ("bf16.weight", "f32.weight", "u16.weight")
    tensors = test_golden._lossless_tensors()
    return {name: tensors[name] for name in names}


def _weights() -> dict[str, Any]:
    """Weights of each dtype, of rank 2 and 3, with channels in rows and in columns."""
    rng = np.random.default_rng(21)
    values = rng.standard_normal((26, 38)).astype(np.float32)
    experts = bf16(rng.standard_normal((3, 10, 22)))
    return {
        "ordered": ("BF16", bf16(values * np.exp(rng.standard_normal(38)))),
        "tiles": ("F16", (values * 3).astype(np.float16)),
        "huge": ("F32", values * np.float32(2.0**90)),
        "h.0.attn.c_attn.weight": ("F32", values.T.copy()),
        "experts.down_proj": ("BF16", experts),
        "norm": ("F32", np.ones(16, np.float32)),
    }


def _steps(factor: float) -> Callable[[Any], Any]:
    """Steps of every kind: column groups or none, scales of both types, small tiles with edges."""

    def provide(plan: Any) -> Any:
        name = plan.source.name
        short = name in ("ordered", "h.0.attn.c_attn.weight")
        tile = (16, 24) if name in ("tiles", "experts.down_proj") else None
        steps = make_steps(plan, factor, short=short, tile=tile)
        return replace(steps, col_groups=None) if name == "huge" else steps

    return provide


def _rated(provider: ParamsProvider) -> ParamsChoice:
    calibration = Calibration(kind="random", tokens=128, seed=0, sha256="0" * 64)
    return ParamsChoice(provider, Rate(bits=5.0, calibrate="random"), calibration)


def _shards(base: Path) -> Path:
    """Two shards; a tied tensor."""
    rng = np.random.default_rng(22)
    first = bf16(rng.standard_normal((30, 40)))
    second = bf16(rng.standard_normal((30, 40)))
    shards = [
        {"embed": ("BF16", first), "norm": ("BF16", bf16(np.ones(40)))},
        {"head": ("BF16", first), "other": ("BF16", second)},
    ]
    source = write_sharded_source(base / "source", shards)
    convert(source, base / "container", scheme="lossless", max_shard_bytes=3000)
    return base / "container"


def _changed(base: Path, change: Callable[[Path], object]) -> Path:
    folder = builders.make_container(base)
    change(folder)
    return folder


def bad_base(name: str, base: Path) -> Path:
    """Makes the container that faults of one base damage."""
    makers = {
        "plain": builders.make_container,
        "flags": builders.make_flags_container,
        "rans": builders.make_rans_container,
        "columns": builders.make_columns_container,
    }
    return makers[name](base)


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns dtype, shape and sha256 of the bytes of every tensor."""
    with Container(folder) as container:
        return {
            name: {
                "dtype": record.dtype,
                "shape": list(record.shape),
                "sha256": sha256_hex(read_tensor_bytes(container, name)),
            }
            for name, record in container.records.items()
        }


def slug(words: str) -> str:
    """Returns words as part of a folder's name.

    >>> slug("stored_bytes one slot longer")
    'stored-bytes-one-slot-longer'
    """
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def make_good(scratch: Path) -> None:
    """Writes the containers of `conformance/good` that are not there."""
    expected = {}
    for name, make in good_containers().items():
        if not (GOOD / name).exists():
            (scratch / name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(make(scratch / name), GOOD / name)
        expected[name] = {"tensors": facts_of(GOOD / name)}
    _write(GOOD / EXPECTED, expected)


def make_bad(scratch: Path) -> None:
    """Writes the containers of `conformance/bad` that are not there."""
    rules = spec_rules()
    bases = {name: bad_base(name, scratch / name) for name in BASES}
    expected = {}
    for fault in all_faults():
        name = f"{fault.rule}-{slug(fault.name)}"
        rule = rules[fault.rule]
        if not (BAD / name).exists():
            fault.damage(tampering.copy_of(bases[fault.base], BAD / name))
        expected[name] = {
            "rule": rule.name,
            "error": rule.error,
            "verifier_only": rule.verifier_only,
            "fault": fault.name,
        }
    _write(BAD / EXPECTED, dict(sorted(expected.items())))


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Makes the containers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", action="store_true", help="make only those that are missing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.add:
            for path in (GOOD, BAD):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
        make_good(Path(folder) / "good")
        make_bad(Path(folder) / "bad")


if __name__ == "__main__":
    main()
