"""Models with code of their own: copied with --with-code, run only where the caller says so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from codecllm.converter import convert
from codecllm.formats.errors import (
    ChecksumError,
    TruncatedError,
    UnsafePathError,
    UnsupportedEnvironmentError,
)
from codecllm.loader import from_pretrained

CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
IDS = torch.tensor([[1, 5, 9]])


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=128,
    )
    folder = tmp_path / "source"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL)
    _edit(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    return folder


def _edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_listed_code_runs_where_the_caller_says_so(source, tmp_path):
    convert(source, tmp_path / "c", scheme="lossless", with_code=True)
    auto = transformers.AutoModelForCausalLM
    expected = auto.from_pretrained(source, trust_remote_code=True)
    for model in (
        from_pretrained(tmp_path / "c", trust_remote_code=True),
        auto.from_pretrained(tmp_path / "c", trust_remote_code=True),
    ):
        assert type(model).__name__ == "OwnForCausalLM"
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_without_the_callers_word_one_sentence_says_what_to_do(source, tmp_path):
    convert(source, tmp_path / "with", with_code=True)
    with pytest.raises(
        UnsupportedEnvironmentError, match=r"2 Python files.*trust_remote_code=True"
    ):
        from_pretrained(tmp_path / "with")
    report = convert(source, tmp_path / "without")
    assert any("--with-code copies them" in line for line in report.warnings)
    for trust in (False, True):
        with pytest.raises(UnsupportedEnvironmentError) as caught:
            from_pretrained(tmp_path / "without", trust_remote_code=trust)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedEnvironmentError, match="--with-code"):
        from_pretrained(tmp_path / "without")


def test_damaged_unlisted_and_missing_code_never_runs(source, tmp_path):
    convert(source, tmp_path / "c", with_code=True)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for number, (name, error) in enumerate(
        [("modeling_own.py", ChecksumError), ("parts/more.py", UnsafePathError)]
    ):
        copy = shutil.copytree(tmp_path / "c", tmp_path / f"copy{number}")
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        text = MODEL if name == "modeling_own.py" else ""
        path.write_text((trap + text)[: len(MODEL)].ljust(len(MODEL)) if text else trap)
        with pytest.raises(error) as caught:
            from_pretrained(copy, trust_remote_code=True)
        assert caught.value.file == name
    (tmp_path / "c" / "modeling_own.py").unlink()
    with pytest.raises(TruncatedError):
        from_pretrained(tmp_path / "c", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_is_refused(source, tmp_path):
    _edit(source, auto_map={"AutoConfig": "user/other--configuration_own.OwnConfig"})
    convert(source, tmp_path / "c", with_code=True)
    with pytest.raises(UnsafePathError, match="another repository"):
        from_pretrained(tmp_path / "c", trust_remote_code=True)


@pytest.mark.parametrize(
    "module",
    ["{}/elsewhere/modeling_own", "/proc/self/cwd/modeling_own", "../modeling_own", "", "a.b"],
)
def test_code_of_another_folder_is_refused(source, tmp_path, module):
    """transformers joins the name of a module to the folder, and an absolute path wins."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (elsewhere / "modeling_own.py").write_text(trap + MODEL)
    reference = f"{module.format(tmp_path)}.OwnForCausalLM"
    for number, value in enumerate((reference, [None, reference], [[reference]], 5)):
        _edit(source, auto_map={**AUTO_MAP, "AutoModelForCausalLM": value})
        out = tmp_path / f"c{number}"
        convert(source, out, with_code=True)
        with pytest.raises(UnsafePathError, match="no module of the folder and a class"):
            from_pretrained(out, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_model_type_that_transformers_has_needs_no_code(source, tmp_path):
    _edit(source, model_type="llama", architectures=["LlamaForCausalLM"])
    convert(source, tmp_path / "c", scheme="lossless")
    assert type(from_pretrained(tmp_path / "c")).__name__ == "LlamaForCausalLM"
