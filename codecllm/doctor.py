"""Examines this machine.

Installed packages, usable decoders, and the bits that each decoder gives.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from codecllm import __version__
from codecllm.converter import convert
from codecllm.formats.codecs import CodecName, native
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import DecodeError, one_line
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tile_run import decode_natively, decode_plainly

PACKAGES = (
    "numpy",
    "safetensors",
    "zstandard",
    "xxhash",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "huggingface-hub",
    "nvidia-libnvcomp-cu12",
    "nvidia-libnvcomp-cu13",
)
CODECS: tuple[CodecName, ...] = ("zstd", "rans")

State = Literal["works", "absent", "wrong"]


@dataclass(frozen=True, slots=True)
class DecoderFinding:
    """One decoder on one device.

    Attributes:
        device: `cpu`, or a device as torch names it.
        decoder: name of the decoder.
        state: `works`: its self-test gave the bits of the reference. `absent`: it cannot run here.
            `wrong`: it failed the test.
        detail: the test, or the reason why there was none.
    """

    device: str
    decoder: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The result of `examine`.

    Attributes:
        versions: package or program -> version, None where it is not installed.
        devices: accelerators, as torch names them -> model and memory.
        findings: a decoder each.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    findings: list[DecoderFinding]

    @property
    def ok(self) -> bool:
        """Whether no decoder that runs here is wrong."""
        return all(finding.state != "wrong" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "ok": self.ok,
            "versions": self.versions,
            "devices": self.devices,
            "decoders": [asdict(finding) for finding in self.findings],
        }


def examine() -> DoctorReport:
    """Examines the machine and tests every decoder on a small container of each codec."""
    devices = _devices()
    with (
        tempfile.TemporaryDirectory(prefix="codecllm-doctor-") as base,
        _containers(Path(base)) as containers,
    ):
        findings = [_reference_finding(containers, codec) for codec in CODECS]
        findings.append(_native_finding(containers))
        findings += _cpu_findings(containers)
        for device in devices:
            findings += _device_findings(containers, device)
        if not devices:
            findings += [
                DecoderFinding("gpu", decoder, "absent", _why_no_device())
                for decoder in ("nvcomp", "triton")
            ]
    return DoctorReport(_versions(), devices, findings)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"codecllm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if versions["torch"] is not None:
        import torch

        versions["CUDA of torch"] = torch.version.cuda
        if torch.version.hip is not None:
            versions["ROCm of torch"] = torch.version.hip
    return versions


def _why_no_device() -> str:
    return "torch is not installed" if _versions()["torch"] is None else "torch finds no GPU"


def _devices() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    # The loader's list: only devices that a load can use are examined.
    from codecllm.loader.device.streams import ACCELERATORS

    devices = {}
    for kind in ACCELERATORS:
        module: Any = getattr(torch, kind, None)
        for index in range(
            module.device_count() if module is not None and module.is_available() else 0
        ):
            facts = module.get_device_properties(index)
            capability = (
                f", compute capability {facts.major}.{facts.minor}" if kind == "cuda" else ""
            )
            devices[f"{kind}:{index}"] = (
                f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB{capability}"
            )
    return devices


@contextmanager
def _containers(base: Path) -> Iterator[dict[str, Path]]:
    """Yields containers by codec: int8 by rows and by columns, lossless, and plain."""
    # A fixed seed: two reports of one machine can be compared.
    rng = np.random.default_rng(0)
    # Tiles of 16 KiB divide none of these, so that smaller tiles at the edges occur.
    values = {"rows.weight": (400, 384), "h.0.attn.c_attn.weight": (200, 384), "kept": (300, 300)}
    arrays = {
        name: (0.02 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in values.items()
    }
    arrays["kept"][7, 7] = np.nan  # int8 cannot hold it: stored without loss
    arrays["norm.weight"] = np.ones(300, np.float32)
    source = base / "source"
    source.mkdir()
    save_file(arrays, source / "model.safetensors", {"format": "pt"})
    # GPT-2, whose Conv1D has scales for columns.
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    yield {
        codec: convert(source, base / codec, codec=codec, non_finite="lossless", chunk_kib=16).out
        for codec in CODECS
    }


def _finding(device: str, decoder: str, detail: str, test: Callable[[], None]) -> DecoderFinding:
    try:
        test()
    except Exception as exc:
        # A decoder may fail in any way: the report names it and goes on.
        return DecoderFinding(
            device,
            decoder,
            "wrong",
            f"{detail}: {one_line(exc, 300) or type(exc).__name__}",
        )
    return DecoderFinding(device, decoder, "works", detail)


def _reference_finding(containers: dict[str, Path], codec: str) -> DecoderFinding:
    def test() -> None:
        with Container(containers["zstd"]) as one, Container(containers[codec]) as other:
            for name in one.records:
                if read_tensor_bytes(one, name) != read_tensor_bytes(other, name):
                    raise DecodeError("the codecs differ", tensor=name)

    return _finding("cpu", f"reference, {codec}", "a small model converts, reads and checks", test)


def _native_finding(containers: dict[str, Path]) -> DecoderFinding:
    if native.core is None:
        return DecoderFinding("cpu", "native core", "absent", native.describe())

    def test() -> None:
        for folder in containers.values():
            with Container(folder) as container:
                for name in container.records:
                    tensor = container.tensor(name)
                    if isinstance(tensor, StoredTensor):
                        _decode_both_ways(tensor)

    return _finding("cpu", "native core", f"{native.describe()}; same bits as numpy", test)


def _decode_both_ways(tensor: StoredTensor) -> None:
    tiles = range(len(tensor.table.grid))
    chunks = len(tiles) * tensor.table.planes
    slots = tensor.read_slots(0, chunks, bytearray(tensor.slots_bytes(0, chunks)))
    itemsize = DTYPES[tensor.record.dtype].itemsize
    shape = (tensor.table.grid.rows, tensor.table.grid.cols)
    # Zeros: memory of an earlier test could hold the right bytes.
    plain, fast = (np.zeros(shape, f"<u{itemsize}") for _ in range(2))
    decode_plainly(tensor, tiles, plain, tensor.record.dtype, slots)
    if not decode_natively(tensor, tiles, fast, tensor.record.dtype, slots):
        raise DecodeError("refused by the native core", tensor=tensor.record.name)
    if not np.array_equal(plain, fast):
        raise DecodeError("decoded to other bits than by numpy", tensor=tensor.record.name)


def _cpu_findings(containers: dict[str, Path]) -> list[DecoderFinding]:
    try:
        from codecllm.loader.stream import stream_tensors
    except ImportError as exc:
        return [DecoderFinding("cpu", "loader", "absent", str(exc))]

    def test(codec: str) -> None:
        with Container(containers[codec]) as container:
            for record, tensor in stream_tensors(container):
                _compare(container, record.name, tensor)

    return [
        _finding("cpu", f"loader, {codec}", "same bits as the reference", partial(test, codec))
        for codec in CODECS
    ]


def _device_findings(containers: dict[str, Path], name: str) -> list[DecoderFinding]:
    import torch

    from codecllm.loader.device.codecs import NOTHING, find_codecs

    device = torch.device(name)
    codecs = find_codecs(device)
    findings = []
    for codec in CODECS:
        # Devices without decoders of their own take this path.
        test = partial(_feed, containers[codec], device, NOTHING)
        findings.append(
            _finding(name, f"cpu, {codec}", "decoded on the CPU; same bits as the reference", test)
        )
    library = (
        f"nvCOMP {codecs.nvcomp.version} for CUDA {codecs.nvcomp.cuda}"
        if codecs.nvcomp is not None
        else "nvCOMP"
    )
    for decoder, codec, what in (
        ("nvcomp", "zstd", f"zstd by {library}"),
        ("triton", "rans", "rans and weights by our kernels"),
    ):
        if decoder in codecs.reasons:
            findings.append(DecoderFinding(name, decoder, "absent", codecs.reasons[decoder]))
        else:
            test = partial(_feed, containers[codec], device, codecs)
            findings.append(_finding(name, decoder, f"{what}; same bits as the reference", test))
    return findings


def _feed(folder: Path, device: Any, codecs: Any) -> None:
    """Brings every tensor of a container to a device and compares it.

    Raises:
        DecodeError: it differs from that of the reference.
    """
    from codecllm.loader.device.engine import DeviceEngine
    from codecllm.loader.device.streams import DeviceStreams
    from codecllm.loader.engine import Request
    from codecllm.loader.torch_tensors import torch_dtype

    with (
        Container(folder) as container,
        closing(DeviceEngine(container, 2, DeviceStreams(device), codecs)) as engine,
    ):
        for name, record in container.records.items():
            request = Request(name, dtype=torch_dtype(record.dtype))
            _compare(container, name, engine.take(request).get().cpu())


def _compare(container: Container, name: str, tensor: Any) -> None:
    import torch

    # Bytes are compared: NaN differs from itself, and -0.0 equals 0.0.
    got = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if got != read_tensor_bytes(container, name):
        raise DecodeError("decoded to other bits than the reference", tensor=name)
