"""Types of the options of commands with their help texts; parsing of sizes and text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from codecllm.formats.errors import UsageError

# The same choices as in the library, spelled again: its modules import numpy and torch, and --help
# must be fast.
SchemeName = Literal["int8", "lossless"]
CodecChoice = Literal["zstd", "rans"]
QualityName = Literal["high", "balanced", "small"]
NonFiniteName = Literal["error", "lossless"]
LevelName = Literal["structure", "checksums", "full"]
ResidentName = Literal["dense", "int8", "compressed"]
EvalDtypeName = Literal["float32", "bfloat16"]
FormatName = Literal["safetensors", "compressed-tensors", "gguf"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit, where the model is a Hub id.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Threads. Default: one per core, at most 16 to convert. Never changes a byte.", min=1
    ),
]
OutFolder = Annotated[Path, typer.Argument(help="Folder to make.")]
LocalContainer = Annotated[Path, typer.Argument(help="Container: a local folder.")]
ContainerName = Annotated[str, typer.Argument(help="Container: a folder or a Hub id.")]
MaxShardSize = Annotated[
    str, typer.Option(help="No shard is longer: bytes, or with kB, MB, GB, KiB, MiB, GiB.")
]
Private = Annotated[bool, typer.Option(help="Make it private; stop where it exists and is public.")]

# Options of `convert`.

RATE_PANEL = "Rate: how many bits a weight may take"

SourceName = Annotated[
    str, typer.Argument(help="Hub id (user/name) or local folder with safetensors weights.")
]
Scheme = Annotated[
    SchemeName, typer.Option(help="int8: one scale per output channel. lossless: every bit.")
]
Codec = Annotated[
    CodecChoice,
    typer.Option(
        help="zstd: fast everywhere. rans: smaller, fastest on GPUs, slow on a CPU without the "
        "native core."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Bits per quantized weight, everything counted: any number from 2 to 8.",
        rich_help_panel=RATE_PANEL,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Instead of --bits: source bytes / stored bytes.", rich_help_panel=RATE_PANEL
    ),
]
Quality = Annotated[
    QualityName | None,
    typer.Option(
        help="Instead of --bits: high is 6 bits, balanced 5, small 4.", rich_help_panel=RATE_PANEL
    ),
]
CodeBits = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=8,
        help="In place of a rate: bits that hold every code of a linear layer, for packed exports "
        "(compressed-tensors) of that width. At equal size the KL is a multiple of that of --bits: "
        "docs/exports.md.",
        rich_help_panel=RATE_PANEL,
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="text|self|random|none|FILE",
        help="The text on which sensitivities are measured: a short one of several kinds that "
        "codecllm brings along (default), one that the model writes itself, random tokens, none, "
        "or the start of a text file.",
        rich_help_panel=RATE_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="Where the model runs while sensitivities are measured and the baseline is recorded, "
        "and where codes are refined: "
        "minutes instead of hours for billions of weights. Sums are rounded otherwise on another "
        "device, so the bytes may differ from those of the CPU.",
        rich_help_panel=RATE_PANEL,
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="Let each column of a linear layer make up for the rounding of those before it: 0.1 "
        "bit a weight less at "
        "equal quality. The model writes a text four times as long, and calibrating takes four "
        "times as long. Needs a "
        "calibration, and room for a temporary file: 4 bytes for each pair of a layer's inputs.",
        rich_help_panel=RATE_PANEL,
    ),
]
ColumnScales = Annotated[
    bool,
    typer.Option(
        "--column-scales/--no-column-scales",
        help="Without scales of columns, and codes beyond 8 bits, the container can be exported "
        "packed (compressed-tensors), at a higher KL: docs/bits.md has the price.",
        rich_help_panel=RATE_PANEL,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Quantize tensors matching this glob too. May be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Do not quantize tensors matching this glob. May be repeated."),
]
NonFinite = Annotated[
    NonFiniteName,
    typer.Option(help="NaN or infinite weights under int8: stop, or keep such tensors lossless."),
]
ChunkKib = Annotated[
    int,
    typer.Option(
        min=4, max=1024, help="KiB of symbols in a chunk; small ones suit GPUs and cost some size."
    ),
]
ConvertBaseline = Annotated[
    bool | None,
    typer.Option(
        "--baseline/--no-baseline",
        help="Run the source and the converted model on fixed prompts and record both. Default: "
        "if under 10 minutes.",
    ),
]
Force = Annotated[bool, typer.Option(help="Replace a container that is in the way.")]
WithCode = Annotated[
    bool,
    typer.Option(
        "--with-code",
        help="Copy the repository's Python files too (auto_map). They run only where a loading "
        "call says "
        "trust_remote_code=True.",
    ),
]
DryRun = Annotated[bool, typer.Option(help="Predict sizes per tensor and in all; write nothing.")]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="USER/NAME",
        help="Then verify it and upload it to this Hub repository.",
    ),
]
PushPrivate = Annotated[bool, typer.Option(help="With --push: a private repository.")]

# Options of `verify`.

Level = Annotated[
    LevelName,
    typer.Option(
        help="structure: names, sizes, headers. checksums: every byte. full: decode all and run "
        "the baseline too."
    ),
]
CompareSource = Annotated[
    str | None,
    typer.Option(help="Compare every decoded tensor with this model (folder or Hub id)."),
]
RequireBaseline = Annotated[bool, typer.Option(help="Fail where no baseline is recorded.")]
RunBaseline = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="Run the recorded prompts (level full).")
]
ManifestSha256 = Annotated[
    str | None, typer.Option(help="Accept only the manifest with this sha256: pins every byte.")
]
Signature = Annotated[
    Path | None,
    typer.Option(help="Signature of the folder: every file must be as it was signed."),
]
PublicKey = Annotated[
    Path | None, typer.Option(help="Public key of the signer (PEM); goes with --signature.")
]
Identity = Annotated[
    str | None,
    typer.Option(
        help="Signer in a certificate of Sigstore, such as a mail address; goes with --signature "
        "and --issuer."
    ),
]
Issuer = Annotated[
    str | None, typer.Option(help="URL of the issuer that vouched for --identity.", metavar="URL")
]
TrustConfig = Annotated[
    Path | None,
    typer.Option(
        help="Sigstore's trust configuration as a file. Default: fetched from its servers."
    ),
]
PrivateKey = Annotated[
    Path, typer.Option(help="Key to sign with: PEM, elliptic curve P-256, P-384 or P-521.")
]
SignatureFile = Annotated[
    Path | None,
    typer.Option("--signature", help="File to write. Default: the folder's name and .sig."),
]
KeyPassword = Annotated[
    str | None,
    typer.Option(
        envvar="CODECLLM_KEY_PASSWORD",
        help="Password of the key. Give it by the variable: others see a command line.",
    ),
]
Diagnose = Annotated[
    bool,
    typer.Option(
        "--diagnose",
        help="Say why the output is wrong: stage by stage, then one paragraph. Needs the source.",
    ),
]
HtmlReport = Annotated[
    Path | None,
    typer.Option(
        "--report", help="Write the diagnosis as one HTML file with plots.", metavar="FILE"
    ),
]
FirstLayers = Annotated[
    int | None,
    typer.Option(
        help="Diagnose with only the first N layers from the container, the others from the "
        "source.",
        min=0,
    ),
]
DiagnosisText = Annotated[
    Path | None,
    typer.Option(help="Text file for the diagnosis' perplexity instead of the built-in one."),
]
DiagnosedResident = Annotated[
    ResidentName | None,
    typer.Option(
        help="Diagnose the model that runs with its weights kept so (default dense); weights are "
        "compared in all."
    ),
]


def parse_size(text: str) -> int:
    """Returns the bytes of a size.

    Examples:
        >>> [parse_size(text) for text in ("5GB", "512MiB", "1000000")]
        [5000000000, 536870912, 1000000]

    Raises:
        UsageError: not a positive size.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    }
    number = text.strip().rstrip("abgikmABGIKM")
    unit = text.strip()[len(number) :].lower()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as exc:
        raise UsageError("not a size", got=text, expected="for example 5GB or 512MiB") from exc
    if size < 1:
        raise UsageError("size must be positive", got=text)
    return size
