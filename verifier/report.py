"""The report of a verification: stages with verdicts, and findings with the place of each fault."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from codecllm.formats.errors import CodecLLMError

_PLACE = ("file", "tensor", "chunk", "byte", "got", "expected")


class Verdict(StrEnum):
    """The outcome of a stage."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        error: the error that describes it.
        cause: name of the cause, where a diagnosis found one (`diagnosis.causes.Cause`).
        channel: the output channel concerned, where there is one.
        module: the module or layer concerned, where there is one.
    """

    error: CodecLLMError
    cause: str | None = None
    channel: int | None = None
    module: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns class, message, place, and the whole line, as JSON values."""
        error = self.error
        facts = {name: getattr(error, name) for name in _PLACE}
        # An error may hold a shape or a numpy number, which JSON does not have.
        plain = {
            name: value if isinstance(value, int | str | None) else str(value)
            for name, value in facts.items()
        }
        context = {"cause": self.cause, "channel": self.channel, "module": self.module}
        known_context = {name: value for name, value in context.items() if value is not None}
        return {
            "error": type(error).__name__,
            "message": error.message,
            **plain,
            **known_context,
            "text": str(error),
        }


@dataclass(slots=True)
class Stage:
    """One stage of a verification.

    Attributes:
        name: for example `checksums`.
        summary: one line: the checked parts, or why the stage was skipped.
        findings: every fault, in file order.
        facts: figures for machines.
        skipped: whether it did not run.
    """

    name: str
    summary: str = ""
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    @property
    def verdict(self) -> Verdict:
        """FAILED with any finding, else SKIPPED or OK."""
        # A stage that was skipped may have findings from before: a fault outranks the skip.
        if self.findings:
            return Verdict.FAILED
        return Verdict.SKIPPED if self.skipped else Verdict.OK

    def fail(
        self,
        error: CodecLLMError,
        *,
        cause: str | None = None,
        channel: int | None = None,
        module: str | None = None,
    ) -> None:
        """Adds a fault."""
        self.findings.append(Finding(error, cause, channel, module))


@dataclass(slots=True)
class Report:
    """The whole verification.

    Attributes:
        container: folder or Hub id, as it was given.
        level: `structure`, `checksums` or `full`.
        manifest_sha256: of the manifest that was checked, or None where there is none.
        stages: in the order in which they ran.
        warnings: remarks that deserve a look and are no faults.
        commit: commit of the Hub repository that was checked, or None for a local folder.
        conclusion: one paragraph: the fault, its place and its remedy; only a diagnosis has one.
    """

    container: str
    level: str
    manifest_sha256: str | None = None
    stages: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    commit: str | None = None
    conclusion: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no stage failed."""
        return all(stage.verdict is not Verdict.FAILED for stage in self.stages)

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the first fault's error class."""
        # Stages run from the bytes to the model, so the first fault is nearest to the cause.
        return next(
            (finding.error.exit_code for stage in self.stages for finding in stage.findings), 0
        )

    def stage(self, name: str) -> Stage | None:
        """Returns the stage of that name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "container": self.container,
            "commit": self.commit,
            "level": self.level,
            "ok": self.ok,
            "exit_code": self.exit_code,
            "manifest_sha256": self.manifest_sha256,
            "stages": [
                {
                    "name": stage.name,
                    "verdict": stage.verdict.value,
                    "summary": stage.summary,
                    "facts": stage.facts,
                    "findings": [finding.to_dict() for finding in stage.findings],
                }
                for stage in self.stages
            ],
            "warnings": self.warnings,
            **({} if self.conclusion is None else {"conclusion": self.conclusion}),
        }

    def to_json(self) -> str:
        """Returns the report as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
