"""The causes that a diagnosis can name, and its conclusion in one paragraph."""

from __future__ import annotations

from enum import StrEnum

from codecllm.verifier.report import Finding, Report, Stage, Verdict


class Cause(StrEnum):
    """The cause of a fault."""

    DAMAGED = "damaged container"
    OTHER_MODEL = "source of another model"
    OTHER_REVISION = "source of another revision"
    CORRUPTED_PAYLOAD = "corrupted payload"
    SHIFTED = "shifted buffer"
    SWAPPED_SCALES = "swapped scales"
    PER_TENSOR_SCALE = "one scale for a whole tensor"
    COARSE_STEP = "quantizer step too coarse"
    ROUNDED_SCALES = "scales rounded to a narrower type"
    SCALE_OVERFLOW = "scale overflowed"
    WRONG_SCALE = "wrong scale"
    HEAD_ORDER = "wrong head order"
    ROW_ORDER = "wrong row order"
    NON_FINITE = "NaN or infinite weights"
    BACK_END = "decode back end"
    LOAD_FAILED = "model does not load"
    NOT_REPLACED = "layer not replaced"
    REPLACED_TWICE = "layer replaced twice"
    SCALE_AXIS = "scales along the wrong axis"
    SCALE_NOT_APPLIED = "scales not applied"
    TRANSPOSED = "transposed weight"
    WRONG_TENSOR = "weight of another tensor"
    NOT_TIED = "tied weights not tied"
    ON_META = "weight without data"
    WRONG_WEIGHT = "wrong weight"
    COMPUTATION = "computation differs"
    CACHE = "stale cache of keys and values"
    WRONG_TOKENIZER = "wrong tokenizer"
    UNDECODABLE = "undecodable bytes in the text"
    PRECISION = "too little precision"
    TEXT_DIFFERS = "text differs"


# Said by several causes in the same words, so that readers know a remedy again.
_CONVERT = "Convert the source again, or fetch the container anew and pin its manifest's sha256."
_WRITER = (
    "The writer of this container is at fault: convert again with this version, and report the "
    "writer that the manifest names."
)
_LOADER = (
    "The container is right and the loading code is at fault: load it with this version of "
    "codecllm and no other patches."
)

ADVICE: dict[Cause, tuple[str, str]] = {
    Cause.DAMAGED: (
        "Stored bytes are not what the manifest promises.",
        "Fetch or convert the container again.",
    ),
    Cause.OTHER_MODEL: (
        "The source's tensors are not those of the container.",
        "Name the model that was converted.",
    ),
    Cause.OTHER_REVISION: (
        "Most tensors differ from this source while the container agrees with its own digests: it "
        "was made from other weights.",
        "Compare with the revision that was converted, or convert this one.",
    ),
    Cause.CORRUPTED_PAYLOAD: (
        "Scales fit the source and some stored symbols do not: the payload or its chunk table was "
        "changed, and checksums were made to fit.",
        _CONVERT,
    ),
    Cause.SHIFTED: (
        "The values are right and stand in the wrong place: a buffer is read or written at an "
        "offset.",
        _LOADER,
    ),
    Cause.SWAPPED_SCALES: ("Codes are right and channels have each other's scales.", _WRITER),
    Cause.PER_TENSOR_SCALE: (
        "All channels share the scale that the tensor's largest weight asks for; the others keep "
        "few codes.",
        "Convert again with one scale per channel (the default).",
    ),
    Cause.COARSE_STEP: (
        "Codes fit the stored scales, and these are larger than the weights ask for.",
        _WRITER,
    ),
    Cause.ROUNDED_SCALES: (
        "Scales are float32 by the format and went through a narrower type.",
        _WRITER,
    ),
    Cause.SCALE_OVERFLOW: (
        "A scale does not fit the narrower type that it went through (float16 ends at 65504).",
        "Keep scales in float32, as the format says.",
    ),
    Cause.WRONG_SCALE: ("Scales are not those that the weights ask for.", _WRITER),
    Cause.HEAD_ORDER: (
        "The rows are right and stand in another order of attention heads: a checkpoint or cache "
        "layout of another program.",
        "Convert from the checkpoint in the layout of transformers, and use its attention code.",
    ),
    Cause.ROW_ORDER: ("The rows are right and stand in another order.", _WRITER),
    Cause.NON_FINITE: (
        "The weights themselves are not numbers: no compressor can help.",
        "Repair the source: train or download it again, then convert.",
    ),
    Cause.BACK_END: (
        "A decode back end of this machine gives other bits than the reference.",
        "Use decoder cpu; update its library.",
    ),
    Cause.LOAD_FAILED: (
        "The container's bytes are right, but no model came of them.",
        "See the error; check config and library versions.",
    ),
    Cause.NOT_REPLACED: ("A layer does not hold the container's weight.", _LOADER),
    Cause.REPLACED_TWICE: ("A layer was replaced, or its scales applied, more than once.", _LOADER),
    Cause.SCALE_AXIS: (
        "Codes and scales are right, but each scale was applied along the other axis.",
        _LOADER,
    ),
    Cause.SCALE_NOT_APPLIED: ("The loaded weight is the codes without their scales.", _LOADER),
    Cause.TRANSPOSED: ("The loaded weight is the right one, transposed.", _LOADER),
    Cause.WRONG_TENSOR: ("The loaded weight is that of another tensor.", _LOADER),
    Cause.NOT_TIED: (
        "Weights that the model ties lie in memory of their own, or the other way round.",
        _LOADER,
    ),
    Cause.ON_META: ("A parameter was left without data.", _LOADER),
    Cause.WRONG_WEIGHT: ("A loaded weight differs from what the container decodes to.", _LOADER),
    Cause.COMPUTATION: (
        "All weights are right, and this module computes something else from them.",
        "Look at the module's code, hooks and kernels; load without patches to compare.",
    ),
    Cause.CACHE: (
        "All weights are right, as is a whole prompt at once; token by token, from the cache of "
        "keys and values, it is not.",
        "Look at the layout in which the cache is written and read (heads, axes, positions, type); "
        "load without patches.",
    ),
    Cause.WRONG_TOKENIZER: (
        "Source and container turn the same text into different tokens, whatever the weights are.",
        "Copy the source's tokenizer files and convert again.",
    ),
    Cause.UNDECODABLE: (
        "The loaded model's tokens are bytes that form no valid text, where the source's do.",
        "The weights lost too much, or a module computes wrongly: see the stages before.",
    ),
    Cause.PRECISION: (
        "Container, loader and modules are right: the quantization itself costs this model too "
        "much.",
        "Keep the tensors with the largest errors lossless (--exclude), or use --scheme lossless.",
    ),
    Cause.TEXT_DIFFERS: (
        "Every weight is right and the text is another one.",
        "Compare library versions and devices of the two runs.",
    ),
}


def conclude(report: Report) -> str:
    """Returns one paragraph on the finding that explains a report: fault, place and advice."""
    explanation = explaining(report)
    if explanation is None:
        skipped_stages = [
            f"{stage.name} ({stage.summary})"
            for stage in report.stages
            if stage.verdict is Verdict.SKIPPED
        ]
        tail = f" Not checked: {'; '.join(skipped_stages)}." if skipped_stages else ""
        return f"No fault found: everything checked agrees with source, container and format.{tail}"
    stage, finding = explanation
    cause = Cause(finding.cause) if finding.cause is not None else Cause.DAMAGED
    meaning, advice = ADVICE[cause]
    parts = [
        f"{cause.value.capitalize()}, found by stage '{stage.name}': {finding.error}.",
        meaning,
        advice,
    ]
    # The first finding explains the stage; the others mostly follow from it.
    more = len(stage.findings) - 1
    if more:
        parts.append(f"The stage has {more} more finding{'s' * (more != 1)}.")
    # Later stages run on wrong weights, so their findings are named and not explained.
    later = [
        repr(other.name)
        for other in report.stages
        if other is not stage and other.verdict is Verdict.FAILED
    ]
    if later:
        parts.append(
            f"Findings of {' and '.join(later)} belong to it, follow from it, or wait behind it."
        )
    return " ".join(parts)


def explaining(report: Report) -> tuple[Stage, Finding] | None:
    """Returns the stage and the finding that explain a report; None without findings.

    It is the first finding with a cause, else the first one.

    `structure` and `checksums` say that bytes are wrong; `round trip`, if it ran, says how.
    """
    failed_stages = [stage for stage in report.stages if stage.verdict is Verdict.FAILED]
    if not failed_stages:
        return None
    # A cause says how bytes are wrong, and not only that they are.
    with_cause = [
        (stage, finding)
        for stage in failed_stages
        for finding in stage.findings
        if finding.cause is not None
    ]
    return with_cause[0] if with_cause else (failed_stages[0], failed_stages[0].findings[0])
