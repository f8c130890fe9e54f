"""SmolLM2 on the local Hub and in other layouts: README.md's figures. `pytest -s` shows them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import codecllm
from codecllm.api import export
from codecllm.converter import convert
from codecllm.formats.errors import UsageError
from codecllm.info import describe, describe_name
from codecllm.publishing import push
from demo import models
from tests.hub.conftest import hub, run  # noqa: F401 - fixtures

pytestmark = pytest.mark.model
REPO = "user/SmolLM2-135M-Instruct-codecllm-int8"
TEXT = "The capital of France is Paris. The tower stands in"


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "int8"
    convert(models.smollm2(), out)
    return out


def test_push_info_verify_generate_by_name(container, hub, run):  # noqa: F811
    report = push(container, REPO, level="checksums")
    hub.log.clear()
    facts = describe_name(REPO)["hub"]
    print(f"info read {facts['transferred_bytes']:,} of {facts['listed_bytes']:,} bytes")
    assert facts["transferred_bytes"] < 0.002 * facts["listed_bytes"]
    done = run("verify", REPO, "--json", "--manifest-sha256", report.manifest_sha256)
    assert done.returncode == 0, done.stderr
    verdicts = {stage["name"]: stage["verdict"] for stage in json.loads(done.stdout)["stages"]}
    assert verdicts == {
        "structure": "ok",
        "checksums": "ok",
        "decode": "ok",
        "ratio": "ok",
        "baseline": "skipped",
    }
    done = run("generate", REPO, "The capital of France is", "--max-new-tokens", "4")
    assert done.stdout.startswith("The capital of France is Paris.")
    card = hub.blobs[hub.entry(REPO, "README.md").sha256].decode()
    assert f"| {describe(container)['bits_per_weight']:.3f} |" in card


def test_compressed_tensors_gives_our_logits(container, tmp_path):
    pytest.importorskip(
        "compressed_tensors",
        reason="the package compressed-tensors is not installed (extra 'test')",
    )
    from transformers import CompressedTensorsConfig

    export(container, tmp_path / "packed", format="compressed-tensors")
    inputs = AutoTokenizer.from_pretrained(container)(TEXT, return_tensors="pt")
    ours = _logits(codecllm.from_pretrained(container), inputs)
    for dequantize in (True, False):
        config = CompressedTensorsConfig(dequantize=dequantize)
        with warnings.catch_warnings(
            action="ignore"
        ):  # transformers: an option given beside the model's own block
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path / "packed", dtype=torch.bfloat16, quantization_config=config
            )
        theirs = _logits(model, inputs)
        difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
        print(
            f"compressed-tensors, dequantize={dequantize}: largest difference {difference:.4f}, "
            f"largest logit {largest:.4f}"
        )
        assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
        assert difference <= (0 if dequantize else 0.05 * largest)


def _logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits.float()


def test_gguf_is_refused_with_figures(container, tmp_path):
    with pytest.raises(UsageError, match=r"[\d,]+ of [\d,]+ would change") as caught:
        export(container, tmp_path / "gguf", format="gguf")
    print(caught.value)
