"""The diagnosis of containers whose steps were chosen: no false finding, and the right one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from codecllm.converter import ParamsChoice, convert
from codecllm.formats.container import Container
from codecllm.formats.reference import read_codes
from codecllm.formats.schemes.int8 import step_sizes
from codecllm.verifier.diagnosis.diagnosis import diagnose
from tests.integration import tiny_models
from tests.stepped import mixed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPTS = ["one"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("columns") / "source")


def _convert(source, out, codec="zstd"):
    convert(
        source,
        out,
        include=("*.weight",),
        exclude=("*norm*",),
        codec=codec,
        choice=ParamsChoice(mixed),
    )
    return out


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_the_diagnosis_finds_nothing_in_a_clean_container(source, tmp_path, codec):
    report = diagnose(_convert(source, tmp_path / "c", codec), str(source), prompts=PROMPTS)
    assert report.ok, report.conclusion
    (stage,) = [stage for stage in report.stages if stage.name == "round trip"]
    assert "1 rounded otherwise" in stage.summary
    (stage,) = [stage for stage in report.stages if stage.name == "loaded"]
    replaced = {facts["resident"]: facts["coded"] for facts in stage.facts["residencies"]}
    assert replaced == {"dense": 0, "int8": 15, "compressed": 16}


def test_codes_with_a_deadzone_are_repeated_one_by_one(source, tmp_path):
    """A finding for a weight with another code, though within the recorded error."""

    def steps(plan):
        return replace(mixed(plan), refined=None, codes=None, deadzone=0.125)

    convert(
        source,
        tmp_path / "c",
        include=("*.weight",),
        exclude=("*norm*",),
        choice=ParamsChoice(steps),
    )
    report = diagnose(tmp_path / "c", str(source), prompts=PROMPTS)
    assert report.ok, report.conclusion
    (stage,) = [stage for stage in report.stages if stage.name == "round trip"]
    assert "otherwise" not in stage.summary
    name, other = "model.layers.1.self_attn.v_proj.weight", tiny_models.llama(tmp_path / "other")
    with Container(tmp_path / "c") as container:
        tensor = container.tensor(name)
        codes = read_codes(tensor)
        row, col = (int(place[0]) for place in np.nonzero((codes > 2) & (codes < 8)))
        step, code = (
            float(step_sizes(tensor.scales, tensor.columns.scales)[row, col]),
            int(codes[row, col]),
        )
    tensors = load_file(other / "model.safetensors")
    tensors[name][row, col] = step * (code - 0.45)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report = diagnose(tmp_path / "c", str(other), prompts=PROMPTS)
    (stage,) = [stage for stage in report.stages if stage.name == "round trip"]
    assert [finding.error.tensor for finding in stage.findings] == [name]


def test_the_diagnosis_names_the_tensor_that_is_of_another_source(source, tmp_path):
    other = tiny_models.llama(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 5] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report = diagnose(_convert(source, tmp_path / "c"), str(other), prompts=PROMPTS)
    assert not report.ok
    (stage,) = [stage for stage in report.stages if stage.name == "round trip"]
    assert [finding.error.tensor for finding in stage.findings] == [name]
