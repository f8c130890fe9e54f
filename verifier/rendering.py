"""The report for people: one verdict line per stage, every fault below its stage."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.verifier.report import Report, Verdict

# A container with damage in each chunk would scroll the verdict off the screen.
FINDINGS_SHOWN = 100
_OF_THE_MACHINE = (UnsupportedEnvironmentError, UsageError)
_MARKS = {
    Verdict.OK: "[green]ok     [/]",
    Verdict.FAILED: "[bold red]FAILED [/]",
    Verdict.SKIPPED: "[yellow]SKIPPED[/]",
}


def render_report(report: Report, console: Console) -> None:
    """Prints a report; at most 100 faults per stage (`--json` lists all)."""
    for stage in report.stages:
        console.print(
            f"{stage.name:<11}{_MARKS[stage.verdict]} {escape(stage.summary)}", highlight=False
        )
        for finding in stage.findings[:FINDINGS_SHOWN]:
            console.print(f"           - {escape(str(finding.error))}", highlight=False)
        if len(stage.findings) > FINDINGS_SHOWN:
            console.print(
                f"           ... and {len(stage.findings) - FINDINGS_SHOWN} more; --json lists all",
                highlight=False,
            )
    for warning in report.warnings:
        console.print(f"warning    {escape(warning)}", style="yellow", highlight=False)
    if report.commit:
        console.print(f"hub        {escape(report.container)} @ {report.commit}", highlight=False)
    if report.manifest_sha256:
        console.print(f"manifest   sha256 {report.manifest_sha256}", highlight=False)
    if report.conclusion is not None:
        console.print(f"\n{escape(report.conclusion)}\n", highlight=False)
    ran = [stage.name for stage in report.stages if stage.verdict is Verdict.OK]
    if report.ok:
        console.print(f"[bold green]verified[/]: {', '.join(ran)}", highlight=False)
    else:
        errors = [finding.error for stage in report.stages for finding in stage.findings]
        if all(isinstance(error, _OF_THE_MACHINE) for error in errors):
            console.print(
                "[bold yellow]not verified[/]: not all checks could run here", highlight=False
            )
            return
        faults = len(errors)
        console.print(
            f"[bold red]not what was published[/]: {faults} fault{'s' * (faults != 1)}",
            highlight=False,
        )
