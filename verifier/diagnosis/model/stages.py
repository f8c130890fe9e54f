"""Stages 3 to 5: everything that needs models in memory, at most two large ones at a time."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    FormatError,
    ModelMismatchError,
    UsageError,
    one_line,
)
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import TOO_LARGE, load_plain
from codecllm.loader.hf.quiet import without_progress_bars
from codecllm.verifier.baseline import model_output as output
from codecllm.verifier.baseline.record import parse_baseline
from codecllm.verifier.baseline.runs import compare_with_record
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.examination import Examination
from codecllm.verifier.diagnosis.model import layer_outputs as layers
from codecllm.verifier.diagnosis.model import text
from codecllm.verifier.diagnosis.model.distances import cosine, relative_error
from codecllm.verifier.diagnosis.model.layer_runs import (
    Run,
    first_layers_of,
    layer_names,
    prompt_of,
    run_model,
)
from codecllm.verifier.diagnosis.model.loaded_model import Comparison, check_loaded_model
from codecllm.verifier.diagnosis.model.reference_model import (
    build_model,
    parameters_of_config,
    reference_tensors,
    requantized_tensors,
)
from codecllm.verifier.diagnosis.model.sample_text import SAMPLE_TEXT
from codecllm.verifier.diagnosis.model.tokenizers import check_tokenizers
from codecllm.verifier.diagnosis.options import RESIDENTS, DiagnoseOptions, Resident
from codecllm.verifier.report import Stage


class ModelStages:
    """The stages that run models, in order; each uses results of the one before.

    Stage 3 holds the reference and one loaded model, the others the source and the loaded one.
    """

    def __init__(
        self,
        container: Container,
        source: SourceModel,
        examined: dict[str, Examination],
        options: DiagnoseOptions,
    ) -> None:
        self._container = container
        self._source = source
        self._examined = examined
        self._options = options
        self._model: Any = None
        self._reference: Any = None
        self._plain: Any = None
        self._coder: output.PromptCoder | None = None
        self._spoken: dict[tuple[int, ...], list[int]] = {}
        self._why_not = ""

    def check_loaded(self, stage: Stage) -> None:
        """Loads the container in every residency and compares each with the reference.

        The model of the residency that the options name is kept.
        """
        if self._is_too_large(stage):
            return
        # The model that later stages run is loaded last, so that two never lie in memory at once.
        order = [resident for resident in RESIDENTS if resident != self._options.resident] + [
            self._options.resident
        ]
        facts = []
        words = []
        for resident in order:
            model = self._load(resident, stage)
            if model is None:
                continue
            # The dtype of the loaded model decides to which one int8 tensors are rounded.
            if self._reference is None:
                self._reference = build_model(
                    self._container, reference_tensors(self._container, model.dtype), model.dtype
                )
            against = Comparison(self._container, self._source, self._reference)
            before = len(stage.findings)
            facts.append(check_loaded_model(model, resident, against, stage))
            same = (
                "all as the verifier computes them"
                if len(stage.findings) == before
                else "not all right"
            )
            coded_counts = f"{facts[-1]['coded']} of {facts[-1]['coded_expected']} weights coded"
            words.append(f"{resident}: {coded_counts}, {facts[-1]['weights']} weights {same}")
            if resident == self._options.resident:
                self._model = model
            del model
            gc.collect()
        stage.facts = {"residencies": facts}
        stage.summary = "; ".join(words)
        if not facts and not stage.findings:
            stage.skipped = True
            stage.summary = self._why_not

    def check_layers(self, stage: Stage, *, explained: bool) -> None:
        """Runs the prompt through all three models and names the first departure.

        Args:
            stage: receives findings and figures.
            explained: whether a stage before has found a fault.
        """
        if self._model is None or self._reference is None:
            _skip(stage, self._why_not or "no model was loaded")
            return
        names = layer_names(self._reference)
        self._coder = output.PromptCoder(self._source.folder, self._model.config)
        # Longer than the baseline's prompts: few rows of inputs round in another way.
        sample = self._coder.prompts([SAMPLE_TEXT])[0]
        tokens = prompt_of(sample.tokens, self._model.config)
        # A wrong container would make reference and loaded model wrong alike.
        if any(one.differs for one in self._examined.values()):
            self._reference = None
            gc.collect()
            right = requantized_tensors(
                self._container, self._source, self._examined, self._model.dtype
            )
            self._reference = build_model(self._container, right, self._model.dtype)
            del right
        self._reference.to(self._model.device)
        try:
            reference = run_model(self._reference, tokens, names)
        except Exception as exc:  # whatever a model class raises when it is run on plain text
            self._why_not = f"the model cannot be run on plain text ({_one_line(exc)})"
            _skip(stage, self._why_not)
            return
        try:
            run = run_model(self._model, tokens, names)
        except Exception as exc:
            self._why_not = "the loaded model cannot be run"
            stage.fail(
                ModelMismatchError(f"the loaded model cannot be run: {_one_line(exc)}"),
                cause=Cause.COMPUTATION,
            )
            return
        # A GPU's kernels round in an order of their own.
        at_once = len(tokens) if self._model.device.type == "cpu" else 1
        slack = layers.slack_for(self._options.resident, at_once)
        for layer in layers.suspects(reference, run, self._model.dtype):
            place = layers.name_departure(
                self._reference, self._model, tokens, layer, explained, slack, stage
            )
            if place is not None:
                stage.facts["first_departure"] = place
                break
        self._check_cached(tokens, stage)
        self._reference = None
        gc.collect()
        self._compare_with_source(reference, run, tokens, names, stage)

    def _check_cached(self, tokens: list[int], stage: Stage) -> None:
        """Runs the end of a prompt again, token by token, if the whole prompt was right."""
        count = min(layers.CACHED_TOKENS, len(tokens) - 1)
        if "first_departure" in stage.facts or count < 1 or not output.generates(self._reference):
            return
        slack = layers.slack_for(self._options.resident, 1)
        try:
            place = layers.name_cached_departure(
                self._reference, self._model, tokens, count, slack, stage
            )
        except Exception:
            # The reference itself cannot go on from a prompt: there is no comparison.
            return
        stage.facts["cached_tokens"] = count
        if place is not None:
            stage.facts["first_departure"] = {**place, "cached": True}

    def check_text(self, stage: Stage) -> None:
        """Compares texts of source and loaded model."""
        if self._plain is None or self._coder is None:
            _skip(stage, self._why_not or "no model was loaded")
            return
        container_coder = output.PromptCoder(self._container, self._model.config)
        check_tokenizers(
            self._coder, container_coder, (self._source.folder, self._container.folder), stage
        )
        inputs = text.make_inputs(self._coder, self._options.prompts, self._options.text)
        source = text.evaluate_outputs(self._plain, inputs)
        count = self._options.first_layers
        speaker = (
            first_layers_of(self._plain, self._model, count)
            if count is not None
            else nullcontext(self._model)
        )
        with speaker as model:
            loaded_outputs = text.evaluate_outputs(model, inputs, source)
        # The baseline has the same prompts: its check takes these texts and runs none again.
        if count is None and loaded_outputs.tokens:
            self._spoken = {
                tuple(prompt.tokens): outputs
                for prompt, outputs in zip(inputs.prompts, loaded_outputs.tokens, strict=True)
            }
        lossless = (
            not any(one.scales is not None for one in self._examined.values())
            and self._model.dtype == self._plain.dtype
        )
        text.compare_text(
            inputs, source, loaded_outputs, (self._coder, container_coder), lossless, stage
        )
        if count is not None:
            stage.facts["first_layers"] = count
            stage.summary = f"first {count} layers from the container: {stage.summary}"
        # The check of free memory counted on two models.
        self._plain = None
        gc.collect()

    def check_baseline(self, stage: Stage) -> None:
        """Compares the loaded model with the record that the conversion left."""
        record = self._container.manifest.file(BASELINE_NAME)
        if self._model is None or record is None:
            _skip(stage, "the container has no baseline" if record is None else self._why_not)
            return
        baseline = parse_baseline(self._container.read_side_file(record))
        if baseline.kind == "none":
            _skip(stage, str(baseline.reason))
            return
        before = len(stage.findings)
        try:
            compare_with_record(self._model, baseline, stage, self._spoken)
        except FormatError:
            # A damaged container ends the stage; another text is a finding like others.
            raise
        except CodecLLMError as exc:
            stage.fail(exc)
        if len(stage.findings) > before:
            stage.summary = f"{len(baseline.greedy) + len(baseline.hidden)} recorded prompts"
        stage.findings[before:] = [
            type(one)(one.error, Cause.TEXT_DIFFERS) for one in stage.findings[before:]
        ]

    def close(self) -> None:
        """Drops the models."""
        self._model = self._reference = self._plain = None

    def _is_too_large(self, stage: Stage) -> bool:
        """Tells whether the config's model is much larger than the container.

        Loading would make up the rest in memory.
        """
        stored_weights = sum(record.elements for record in self._container.manifest.tensors)
        try:
            config_weights = parameters_of_config(self._container)
        except Exception:  # no such class, or a config that it does not take: loading says so
            return False
        if config_weights <= TOO_LARGE * stored_weights:
            return False
        self._why_not = "no model was loaded"
        error = ModelMismatchError(
            "the config describes a larger model: parameters",
            got=stored_weights,
            expected=config_weights,
            file="config.json",
        )
        stage.fail(error, cause=Cause.LOAD_FAILED)
        return True

    def _load(self, resident: Resident, stage: Stage) -> Any:
        """Returns the loaded model; None if the residency does not apply or loading failed."""
        load = self._options.load or from_pretrained
        try:
            with without_progress_bars():
                return load(self._container.folder, resident=resident)
        except UsageError as exc:  # no tensor that this residency would keep
            self._why_not = exc.message
        except Exception as exc:
            self._why_not = "no model was loaded"
            error = (
                exc
                if isinstance(exc, CodecLLMError)
                else ModelMismatchError(f"loading failed: {_one_line(exc)}")
            )
            stage.fail(error, cause=Cause.LOAD_FAILED)
        return None

    def _compare_with_source(
        self,
        reference: Run,
        loaded: Run,
        tokens: list[int],
        names: list[str],
        stage: Stage,
    ) -> None:
        with without_progress_bars():
            self._plain = load_plain(self._source.folder).to(self._model.device).eval()
        source = run_model(self._plain, tokens, names)
        rows = layers.compare_layers(source, reference, loaded)
        stage.facts |= {"tokens": len(tokens), "layers": rows}
        stage.facts["logits"] = {
            "relative_error": relative_error(source.logits, loaded.logits),
            "cosine": cosine(source.logits, loaded.logits),
        }
        if output.generates(self._plain):
            stage.facts["bisect"] = layers.bisect(
                self._plain,
                self._model,
                tokens,
                lambda logits: float(text.kl_per_position(source.logits, logits).nanmean()),
            )
        not_finite = next(
            (row for row in rows if row["not_finite"] > row["not_finite_in_source"]), None
        )
        if not_finite is not None and not stage.findings:
            error = ModelMismatchError(
                f"layer {not_finite['name']!r} gives "
                f"{not_finite['not_finite']} NaN or infinite values"
            )
            stage.fail(error, cause=Cause.PRECISION, module=not_finite["name"])
        if rows:
            worst = max(rows, key=lambda row: row["relative_error"])
            same = sum(row["off_reference"] == 0 for row in rows)
            again = (
                f", {stage.facts['cached_tokens']} of them again one at a time"
                if "cached_tokens" in stage.facts
                else ""
            )
            stage.summary = (
                f"{len(rows)} layers on {len(tokens)} tokens{again}: {same} give the reference's "
                f"bits; against the source the largest relative error is "
                f"{worst['relative_error']:.2e} (layer {worst['name']}), logits' cosine "
                f"{stage.facts['logits']['cosine']:.6f}"
            )


def _one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {one_line(exc)}"


def _skip(stage: Stage, reason: str) -> None:
    stage.skipped = True
    stage.summary = reason
