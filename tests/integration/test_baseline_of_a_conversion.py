"""A conversion puts container and baseline into place together; a failed baseline costs neither."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import codecllm
from codecllm.converter import ParamsChoice
from codecllm.converter.options import Rate
from codecllm.converter.write.staging import STAGING_NAME
from codecllm.formats.container import Container
from codecllm.formats.errors import BaselineError
from codecllm.verifier import verify
from codecllm.verifier.baseline import baseline as recording
from tests import tampering
from tests.stepped import make_steps


def _files(folder):
    return {path.name for path in folder.iterdir()}


def test_the_folder_is_no_container_until_the_baseline_is_recorded(tmp_path, tiny, monkeypatch):
    out, seen = tmp_path / "out", []
    real = recording._run_both

    def run_both(folders, *rest):
        seen.append((_files(out), Container(folders[1]).manifest.file("baseline.json")))
        return real(folders, *rest)

    monkeypatch.setattr(recording, "_run_both", run_both)
    done = codecllm.convert(tiny("llama"), out)
    assert seen == [({STAGING_NAME}, None)]
    assert done.baseline is not None and done.baseline.kind == "greedy"
    with Container(out) as container:
        assert container.manifest.file("baseline.json") is not None
        assert container.manifest_sha256 == done.manifest_sha256 == done.report.manifest_sha256
        assert container.stored_bytes == done.report.stored_bytes
    assert verify(out, require_baseline=True).exit_code == 0


class _StopError(BaseException):
    """A signal, as the command line raises it."""


@pytest.mark.parametrize("error", [BaselineError("far off"), MemoryError(), _StopError()])
def test_a_container_whose_baseline_fails_is_whole_without_one(tmp_path, tiny, monkeypatch, error):
    def run_both(*arguments):
        raise error

    monkeypatch.setattr(recording, "_run_both", run_both)
    with pytest.raises(type(error)) as raised:
        codecllm.convert(tiny("llama"), tmp_path / "out")
    (note,) = raised.value.__notes__
    assert "is complete, without a baseline" in note
    assert not _files(tmp_path / "out") & {STAGING_NAME, "baseline.json"}
    assert verify(tmp_path / "out").exit_code == 0


def test_a_failure_to_write_the_baseline_leaves_nothing(tmp_path, tiny, monkeypatch):
    def attach(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "attach", attach)
    with pytest.raises(OSError, match="No space"):
        codecllm.convert(tiny("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_chosen_parameters_are_gone_when_the_models_are_loaded(tmp_path, tiny, monkeypatch):
    references, alive = [], []

    def choose(source, options, on_stage):
        def provide(plan):
            return make_steps(plan, 0.01)

        references.append(weakref.ref(provide))
        return ParamsChoice(provide, Rate(bits=8.0, calibrate="none"))

    def run_both(*arguments):
        alive.extend(reference() for reference in references)
        raise BaselineError("not run")

    monkeypatch.setattr("codecllm.api.choose_params", choose)
    monkeypatch.setattr(recording, "_run_both", run_both)
    with pytest.raises(BaselineError, match="not run"):
        codecllm.convert(tiny("llama"), tmp_path / "out", bits=8.0)
    assert alive == [None]


def _without_head(tiny, tmp_path):
    source = tampering.copy_of(tiny("bert"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "classifier" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    return source


def test_a_head_that_is_drawn_at_random_is_not_blamed_on_the_container(tmp_path, tiny):
    source = _without_head(tiny, tmp_path)
    done = codecllm.convert(source, tmp_path / "out")
    assert done.baseline is not None and done.baseline.kind == "none"
    words = r"own output is random: its files lack weights.*classifier\.bias, classifier\.weight"
    assert re.search(words, done.baseline.reason)
    assert verify(tmp_path / "out").exit_code == 0
    with pytest.raises(BaselineError, match=words):
        codecllm.convert(source, tmp_path / "required", baseline=True)


def test_a_model_that_is_random_by_itself_is_not_blamed_on_the_container(
    tmp_path, tiny, monkeypatch
):
    forward = transformers.LlamaModel.forward

    def noisy(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        own = torch.Generator()  # whose beginning nobody sets
        own.seed()
        shape, dtype = result.last_hidden_state.shape, result.last_hidden_state.dtype
        result.last_hidden_state = torch.randn(shape, generator=own).to(dtype)
        return result

    monkeypatch.setattr(transformers.LlamaModel, "forward", noisy)
    done = codecllm.convert(tiny("llama"), tmp_path / "out", scheme="lossless")
    assert done.baseline.kind == "none"
    assert "own output is random: two loads of the source" in done.baseline.reason


def test_a_context_shorter_than_the_prompts_is_named(tmp_path):
    common = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=16, **common)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    done = codecllm.convert(tmp_path / "source", tmp_path / "out")
    words = "context of 16 tokens is shorter than the 56 of a prompt"
    assert words in done.baseline.reason
    with pytest.raises(BaselineError, match=words):
        codecllm.convert(tmp_path / "source", tmp_path / "required", baseline=True)
