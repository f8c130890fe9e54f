"""`codecllm verify` accepts whole containers and finds every damage, at each level."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from rich.console import Console

import codecllm
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import BaselineError, UsageError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.info import describe, render
from codecllm.verifier import Verdict, record_baseline, verify
from codecllm.verifier.baseline import model_output
from tests import tampering
from tests.integration import tiny_models


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, tiny):
    """Containers with baselines, by model and scheme."""
    made = {}

    def get(name, scheme):
        if (name, scheme) not in made:
            out = tmp_path_factory.mktemp("recorded") / "c"
            codecllm.convert(
                tiny(name),
                out,
                scheme=scheme,
                include=("*",) if scheme == "int8" else (),
                baseline=True,
            )
            made[name, scheme] = out
        return made[name, scheme]

    return get


def _names(report):
    return {stage.name: stage.verdict for stage in report.stages}


def _tensors(report, stage):
    return [(finding.error.tensor, finding.error.chunk) for finding in report.stage(stage).findings]


@pytest.mark.parametrize("name", sorted(tiny_models.FEW))
@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_whole_container_passes_every_stage(recorded, tiny, name, scheme):
    report = verify(recorded(name, scheme), source=tiny(name), require_baseline=True)
    assert report.exit_code == 0, report.to_json()
    assert set(_names(report).values()) == {Verdict.OK}
    assert list(_names(report)) == [
        "structure",
        "checksums",
        "decode",
        "ratio",
        "source",
        "model",
        "baseline",
    ]
    assert report.warnings == []
    facts = report.stage("ratio").facts
    with Container(recorded(name, scheme)) as container:
        assert facts["stored_bytes"] == container.stored_bytes
    assert 0.2 < facts["efficiency"] <= 1
    json.loads(report.to_json())


def test_lossless_baseline_says_exactly_what_the_source_says(recorded):
    baseline = json.loads((recorded("llama", "lossless") / "baseline.json").read_bytes())
    assert baseline["agreement"] == {"top1": 1.0, "mean_kl": 0.0, "same_tokens": 1.0}
    assert len(baseline["greedy"]) == 8
    for prompt in baseline["greedy"]:
        assert prompt["source"] == prompt["converted"]
        assert len(prompt["source"]["tokens"]) == 32


def test_info_says_how_a_model_agrees_with_its_source(recorded, container):
    folder = recorded("llama", "int8")
    baseline = json.loads((folder / "baseline.json").read_bytes())
    facts = describe(folder)
    assert facts["agreement"] == baseline["agreement"]
    assert facts["agreement"]["mean_kl"] > 0
    console = Console(record=True, width=200)
    render(facts, console)
    shown = console.export_text()
    assert f"quality    top-1 {facts['agreement']['top1']:.1%}" in shown
    assert "not measured on text: the tokenizer makes no or too few tokens of it" in shown
    assert describe(container("llama", "int8"))["agreement"] is None


def test_every_damaged_chunk_is_listed(container, tmp_path):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    hurt = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    for name in hurt:
        tampering.flip_bit(*tampering.payload_place(folder, name), bit=2)
    report = verify(folder)
    assert report.exit_code == 1
    assert {(name, 0) for name in hurt} <= set(_tensors(report, "checksums"))
    assert set(_tensors(report, "decode")) == {(name, 0) for name in hurt}
    assert _names(report)["ratio"] is _names(report)["baseline"] is Verdict.SKIPPED


def test_any_flipped_bit_of_any_file_is_found(recorded, tmp_path):
    """Four hundred flips, spread over every listed file and the manifest."""
    folder = tampering.copy_of(recorded("llama", "int8"), tmp_path / "c")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rng = random.Random(5)
    for number in range(400):
        path = files[number % len(files)]
        byte, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        tampering.flip_bit(path, byte, bit)
        assert verify(folder, level="checksums").exit_code != 0, (path.name, byte, bit)
        tampering.flip_bit(path, byte, bit)
    assert verify(folder, level="checksums").exit_code == 0


def _delete(folder, shard):
    shard.unlink()


def _truncate(folder, shard):
    shard.write_bytes(shard.read_bytes()[:-100])


def _lengthen(folder, shard):
    shard.write_bytes(shard.read_bytes() + b"\0")


def _pointer(folder, shard):
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def _swap(folder, shard):
    other = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _rename(folder, shard):
    shard.rename(folder / "model-00009-of-00009.safetensors")


def _version(folder, shard):
    tampering.reseal(folder, lambda document: document.update(format_version="2.0"))


def _not_a_manifest(folder, shard):
    (folder / MANIFEST_NAME).write_text("<html>")


@pytest.mark.parametrize(
    ("damage", "code", "error"),
    [
        (_delete, 1, "TruncatedError"),
        (_truncate, 1, "TruncatedError"),
        (_lengthen, 1, "LayoutError"),
        (_pointer, 1, "NotAContainerError"),
        (_swap, 1, None),
        (_rename, 1, "TruncatedError"),
        (_version, 3, "UnsupportedVersionError"),
        (_not_a_manifest, 1, "NotAContainerError"),
    ],
)
def test_damaged_folders(tmp_path, tiny, damage, code, error):
    convert(tiny("llama"), tmp_path / "c", scheme="lossless", max_shard_bytes=60_000)
    damage(tmp_path / "c", sorted((tmp_path / "c").glob("model-*.safetensors"))[0])
    report = verify(tmp_path / "c", baseline=False)
    first = report.stages[0].findings[0].to_dict()
    assert report.exit_code == code
    assert error in (None, first["error"])
    assert "\n" not in first["text"]


def test_unlisted_files(tmp_path, container):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    (folder / "README.md").write_text("a card")
    (folder / "notes.txt").write_text("mine")
    report = verify(folder, level="structure")
    assert report.exit_code == 0
    assert report.warnings == ["notes.txt is not listed in the manifest: not checked"]
    shutil.copy(
        sorted(folder.glob("model-*.safetensors"))[0], folder / "model-00002-of-00002.safetensors"
    )
    assert verify(folder, level="structure").exit_code == 1


def test_another_source_is_told_apart(tmp_path, container, tiny):
    other = tiny_models.llama(tmp_path / "other", tied=False)
    report = verify(container("llama", "lossless"), source=other, baseline=False)
    faults = [str(finding.error) for finding in report.stage("source").findings]
    assert report.exit_code == 1
    assert any(
        "the container lacks this tensor" in fault and "lm_head" in fault for fault in faults
    )


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_one_changed_weight_of_the_source_is_found(tmp_path, container, tiny, scheme):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    name = "model.layers.1.mlp.gate_proj.weight"
    from codecllm.converter.source.source import SourceModel

    with SourceModel(source) as model:
        place = model.tensors[name].entry.start + 2 * (5 * 64 + 7)
    tampering.flip_bit(source / "model.safetensors", place + 1, 6)
    report = verify(container("llama", scheme), source=source, baseline=False)
    (fault,) = report.stage("source").findings
    assert fault.error.tensor == name
    assert "1 elements differ from the source, first at row 5, column 7" in str(fault.error)


def test_changed_tokens_in_the_record_are_found(tmp_path, recorded):
    folder = tampering.copy_of(recorded("llama", "int8"), tmp_path / "c")
    baseline = json.loads((folder / "baseline.json").read_bytes())
    baseline["greedy"][3]["converted"]["tokens"][10] ^= 1
    tampering.replace_listed(folder, "baseline.json", json.dumps(baseline).encode())
    report = verify(folder)
    (fault,) = report.stage("baseline").findings
    assert isinstance(fault.error, BaselineError)
    assert "prompt 3" in str(fault.error)
    assert "from token 10 on" in str(fault.error)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_records_of_prompts_that_ran_alone_are_checked_so(tmp_path, tiny, name, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(model_output, "is_batch", lambda prompts: False)
        codecllm.convert(tiny(name), tmp_path / "c", scheme="int8", include=("*",), baseline=True)
    text = (tmp_path / "c" / "baseline.json").read_text()
    # A record of an older version does not have the field.
    assert text.count('"batched":false,') == 1
    older_text = text.replace('"batched":false,', "")
    tampering.replace_listed(tmp_path / "c", "baseline.json", older_text.encode())
    batch_sizes = []
    for function in ("greedy_tokens", "first_output"):
        original = getattr(model_output, function)
        monkeypatch.setattr(
            model_output,
            function,
            lambda model, batch, run=original: batch_sizes.append(len(batch)) or run(model, batch),
        )
    assert verify(tmp_path / "c", require_baseline=True).exit_code == 0
    assert batch_sizes == [1] * 8


def test_prompts_of_a_batch_must_have_one_length(tmp_path, recorded):
    for kind in ("tokens", "converted"):
        folder = tampering.copy_of(recorded("llama", "int8"), tmp_path / kind)
        baseline = json.loads((folder / "baseline.json").read_bytes())
        prompt = baseline["greedy"][5]
        (prompt if kind == "tokens" else prompt["converted"])["tokens"].pop()
        if kind == "converted":
            prompt["top"].pop()
        tampering.replace_listed(folder, "baseline.json", json.dumps(baseline).encode())
        (fault,) = verify(folder).stage("baseline").findings
        assert isinstance(fault.error, BaselineError)
        assert "prompts of one batch differ in length" in str(fault.error)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_another_environment_is_compared_by_distribution(tmp_path, recorded, name):
    folder = tampering.copy_of(recorded(name, "int8"), tmp_path / "c")
    baseline = json.loads((folder / "baseline.json").read_bytes())
    baseline["environment"]["torch"] = "2.0.0"
    tampering.replace_listed(folder, "baseline.json", json.dumps(baseline).encode())
    report = verify(folder)
    assert report.exit_code == 0, report.to_json()
    assert report.stage("baseline").facts["same_environment"] is False
    if baseline["kind"] == "greedy":
        for prompt in baseline["greedy"]:
            for top in prompt["top"]:
                top["logprobs"] = [value - 3 * place for place, value in enumerate(top["logprobs"])]
    else:
        for prompt in baseline["hidden"]:
            prompt["converted"]["samples"][0] += prompt["converted"]["rms"]
    tampering.replace_listed(folder, "baseline.json", json.dumps(baseline).encode())
    assert verify(folder).exit_code == 1


def test_a_container_without_baseline_is_skipped_unless_it_is_required(container):
    folder = container("llama", "int8")
    report = verify(folder)
    assert report.exit_code == 0
    assert _names(report)["baseline"] is Verdict.SKIPPED
    assert verify(folder, require_baseline=True).exit_code == 1


def test_no_config_means_no_baseline(tmp_path, tiny):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    (source / "config.json").unlink()
    done = codecllm.convert(source, tmp_path / "out")
    assert done.baseline.kind == "none"
    assert "config.json" in done.baseline.summary()
    assert _names(verify(tmp_path / "out"))["baseline"] is Verdict.SKIPPED
    with pytest.raises(BaselineError, match=r"config\.json"):
        record_baseline(tmp_path / "out", source, required=True)


def test_levels_and_usage(container):
    folder = container("llama", "int8")
    assert list(_names(verify(folder, level="structure"))) == ["structure"]
    assert list(_names(verify(folder, level="checksums"))) == ["structure", "checksums"]
    with pytest.raises(UsageError, match="level"):
        verify(folder, level="deep")
    with pytest.raises(UsageError, match="level full"):
        verify(folder, level="structure", source="x")


def test_pinned_manifest(container):
    folder = container("llama", "int8")
    sha256 = verify(folder, level="structure").manifest_sha256
    assert verify(folder, level="structure", expected_manifest_sha256=sha256).exit_code == 0
    assert verify(folder, level="structure", expected_manifest_sha256="ab" * 32).exit_code == 1


def test_verification_reports_progress(container):
    seen = []
    verify(
        container("llama", "int8"),
        baseline=False,
        progress=lambda name, done, total: seen.append((name, done, total)),
    )
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]
