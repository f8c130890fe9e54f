"""A push sends verified containers only, and leaves the repository exactly as the container."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

import codecllm
from codecllm.formats import BASE_VERSION
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    ChecksumError,
    FormatError,
    HubError,
    LayoutError,
    NotAContainerError,
    UsageError,
)
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.hub.resolve import listed_names
from codecllm.loader.hf.plain import load_plain
from codecllm.model_card import MARKER
from codecllm.publishing import push
from codecllm.text import in_markdown
from codecllm.verifier.baseline.record import (
    Agreement,
    Baseline,
    Environment,
    GreedyPrompt,
    ModelTokens,
    TextAgreement,
    TopTokens,
    pack_baseline,
)
from codecllm.verifier.side_file import attach
from tests import tampering

REPO = "user/tiny-codecllm-int8"
CARD = {
    "license": "other",
    "license_name": "llama3.1",
    "license_link": "LICENSE",
    "language": ["en", "de"],
}


def names_in(folder):
    with Container(folder) as opened:
        return {"codecllm.json", *listed_names(opened.manifest)}


def tree(hub, repo=REPO, ref="main"):
    found = hub.repos[repo]
    return set(found.commits[found.refs[ref]]) - {".gitattributes"}


def assert_same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value.view(torch.uint8), right[name].view(torch.uint8)), name


def test_push_and_load_back_by_name(hub, container):
    (container / "notes.txt").write_text("nothing of the container")
    report = push(container, REPO, level="full")
    assert tree(hub) == names_in(container) | {"README.md"}
    assert report.upload.commit == hub.repos[REPO].refs["main"]
    assert report.files == len(tree(hub))
    assert_same_weights(codecllm.from_pretrained(REPO), codecllm.from_pretrained(container))
    assert codecllm.verify(REPO, expected_manifest_sha256=report.manifest_sha256).ok
    assert not hub.repos[REPO].private


def test_pushing_again_sends_nothing(hub, container):
    push(container, REPO, level="structure")
    commit, uploads = hub.repos[REPO].refs["main"], len(hub.exchanges("PUT", "/lfs/"))
    assert uploads >= 3
    report = push(container, REPO, level="structure")
    assert report.upload.commit == commit == hub.repos[REPO].refs["main"]
    assert len(hub.exchanges("PUT", "/lfs/")) == uploads


def test_a_smaller_container_leaves_no_shard_of_the_larger_one(hub, container, lossless):
    push(container, REPO, level="structure")
    assert sum(name.endswith(".safetensors") for name in tree(hub)) > 2
    push(lossless, REPO, level="structure")
    assert tree(hub) == names_in(lossless) | {"README.md"}
    assert codecllm.verify(REPO, baseline=False).ok


def test_revisions(hub, container, lossless):
    first = push(container, REPO, level="structure").upload
    second = push(lossless, REPO, level="structure", revision="lossless").upload
    assert (first.revision, second.revision) == ("main", "lossless")
    assert tree(hub) == names_in(container) | {"README.md"}
    assert tree(hub, ref="lossless") == names_in(lossless) | {"README.md"}
    plain = codecllm.from_pretrained(lossless)
    for revision in ("lossless", second.commit):
        assert_same_weights(codecllm.from_pretrained(REPO, revision=revision), plain)
    assert_same_weights(
        codecllm.from_pretrained(REPO, revision=first.commit), codecllm.from_pretrained(container)
    )


def test_pull_request(hub, container, lossless):
    push(container, REPO, level="structure")
    upload = push(lossless, REPO, level="structure", create_pr=True, message="Every bit").upload
    assert upload.revision == "refs/pr/1"
    assert upload.pull_request.endswith(f"{REPO}/discussions/1")
    assert hub.repos[REPO].messages[upload.commit] == "Every bit"
    assert tree(hub) == names_in(container) | {"README.md"}
    loaded = codecllm.from_pretrained(REPO, revision="refs/pr/1")
    assert_same_weights(loaded, codecllm.from_pretrained(lossless))


def test_private(hub, container):
    push(container, REPO, private=True, level="structure")
    assert hub.repos[REPO].private
    with pytest.raises(HubError, match="not found"):
        codecllm.verify(REPO, level="structure", token="hf_reader")
    assert codecllm.verify(REPO, level="structure").ok


def test_private_never_ends_up_public(hub, container):
    hub.add_repo(REPO, {"a": b"b"})
    with pytest.raises(UsageError, match="exists and is public"):
        push(container, REPO, private=True, level="structure")
    assert not hub.exchanges("PUT", "")
    assert tree(hub) == {"a"}


def test_what_does_not_verify_is_not_pushed(hub, container):
    path, byte = tampering.payload_place(container, "model.layers.0.mlp.up_proj.weight")
    tampering.flip_bit(path, byte)
    with pytest.raises(ChecksumError, match=r"not pushed, \d+ faults found") as caught:
        push(container, REPO)
    assert caught.value.file == path.name
    assert "\n" not in str(caught.value)
    assert REPO not in hub.repos
    assert not [exchange for exchange in hub.log if exchange.method != "GET"]


def test_no_container_and_no_owner(hub, container, tmp_path):
    with pytest.raises(NotAContainerError):
        push(tmp_path / "nothing", REPO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAContainerError, match="not pushed"):
        push(tmp_path / "empty", REPO)
    with pytest.raises(UsageError, match="owner"):
        push(container, "name-alone")
    with pytest.raises(UsageError, match="exclude each other"):
        push(container, REPO, revision="branch", create_pr=True)


def test_what_arrived_is_compared(hub, container, monkeypatch):
    from tests import hub_endpoints

    monkeypatch.setattr(
        hub_endpoints.Handler, "_tree_entry", _lying(hub_endpoints.Handler._tree_entry)
    )
    with pytest.raises(LayoutError, match="differs from the manifest"):
        push(container, REPO, level="structure")


def _lying(answer):
    def lie(self, path, entry):
        facts = answer(self, path, entry)
        return {**facts, "lfs": {**facts["lfs"], "oid": "0" * 64}} if "lfs" in facts else facts

    return lie


def test_without_a_token_nothing_is_verified_first(hub, container, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    stages = []
    with pytest.raises(HubError, match="no Hub token: log in"):
        push(container, REPO, on_stage=stages.append)
    with pytest.raises(HubError, match="Invalid credentials"):
        push(container, REPO, on_stage=stages.append, token="hf_wrong")
    assert stages == []
    with pytest.raises(HubError, match="the token may not do this"):
        push(container, REPO, level="structure", token="hf_reader")


# The card.


def card_of(hub, repo=REPO):
    return ModelCard(hub.blobs[hub.entry(repo, "README.md").sha256].decode())


def test_card_of_a_gated_base(hub, container):
    hub.add_repo("base/model", gated=True, card_data={**CARD, "pipeline_tag": "text-generation"})
    report = push(container, REPO, level="structure", base_model="base/model")
    data = card_of(hub).data.to_dict()
    assert data["base_model"] == "base/model"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["codecllm", "int8", "zstd"]
    assert (data["license"], data["license_name"]) == ("other", "llama3.1")
    assert data["license_link"] == "https://huggingface.co/base/model/blob/main/LICENSE"
    assert data["language"] == ["en", "de"]
    assert [
        word for word in ("gated", "llama3.1") if any(word in text for text in report.warnings)
    ] == ["gated", "llama3.1"]
    private = push(
        container, "user/hidden", level="structure", base_model="base/model", private=True
    )
    assert not any("gated" in text for text in private.warnings)


def test_card_states_the_manifest(hub, container):
    hub.add_repo("base/model", card_data={"license": "apache-2.0"})
    report = push(container, REPO, level="structure", base_model="base/model")
    assert report.warnings == []
    facts = json.loads(json.dumps(codecllm.info.describe(container)))
    text = card_of(hub).text
    for figure in (
        f"{facts['container_bytes']:,} bytes",
        f"{facts['source_bytes']:,} bytes",
        f"{facts['ratio']:.3f}x",
        f"| {facts['bits_per_weight']:.3f} |",
        f"{facts['entropy_bits_per_weight']:.3f} bits per weight",
        f"codecllm verify {REPO} \\\n  --manifest-sha256 {facts['manifest_sha256']}\n",
        f"{BASE_VERSION}, written by codecllm",
        "No output of the model was recorded",
        'codecllm.from_pretrained("user/tiny-codecllm-int8")',
    ):
        assert figure in text, figure
    assert "nats" not in text


@pytest.mark.parametrize(
    "config", [b"[]", b"{", b'{"architectures": 5}', b'{"architectures": {"a": 1}}', b"\xff"]
)
def test_a_card_of_a_damaged_config_is_one_error(hub, container, config):
    tampering.replace_listed(container, "config.json", config)
    with pytest.raises(FormatError, match=r"^config\.json: "):
        push(container, REPO, level="structure")
    assert "README.md" not in names_in(container)


def test_card_offers_int8_in_memory_only_where_there_are_codes(hub, container, lossless):
    push(container, REPO, level="structure")
    assert 'resident="int8"' in card_of(hub).text
    assert "the same logits" not in card_of(hub).text
    push(lossless, "user/lossless", level="structure")
    assert "resident=" not in card_of(hub, "user/lossless").text


TEXT_FIGURES = TextAgreement(windows=4, tokens=508, sha256="0" * 64, top1=0.75, mean_kl=0.125)


def _prompt():
    said = ModelTokens(tokens=[1], text="", logits_sha256="0" * 64)
    top = [TopTokens(tokens=[1], logprobs=[0.0])]
    return GreedyPrompt(text="", tokens=[1], source=said, converted=said, top=top)


@pytest.mark.parametrize(
    ("text_figures", "kl", "top1", "on_text"),
    [
        (None, "0.00669 nats", "95.31%", False),
        (TEXT_FIGURES, "0.125 nats", "75.00%", True),
    ],
)
def test_card_states_the_baseline(hub, container, text_figures, kl, top1, on_text):
    where = Environment(
        torch="2.13.0",
        transformers="5.23.0",
        device="cpu",
        dtype="bfloat16",
        attention="sdpa",
        cpu_capability="AVX2",
        threads=2,
    )
    agreement = Agreement(top1=0.9531, mean_kl=0.00669, same_tokens=0.25, text=text_figures)
    baseline = Baseline(
        format="codecllm-baseline", version=1, kind="greedy", environment=where,
        agreement=agreement, greedy=[_prompt()],
    )  # fmt: skip
    with Container(container) as opened:
        attach(container, opened.manifest, BASELINE_NAME, pack_baseline(baseline))
    push(container, REPO, level="structure")
    text = card_of(hub).text
    assert f"| {kl} |" in text
    assert f"| {top1} |" in text
    assert ("508 tokens of a fixed text" in text) == on_text
    assert "torch 2.13.0, transformers 5.23.0, cpu, bfloat16" in text


def test_texts_of_strangers_in_a_card_make_no_markup(hub, container):
    hostile = "<b>`x`</b> [a](http://evil) | c\n\n# Head"
    where = Environment(
        torch=hostile, transformers=hostile, device=hostile, dtype=hostile,
        attention=hostile, cpu_capability=hostile, threads=2,
    )  # fmt: skip
    baseline = Baseline(
        format="codecllm-baseline", version=1, kind="greedy", environment=where,
        agreement=Agreement(top1=0.5, mean_kl=0.5, same_tokens=0.5), greedy=[_prompt()],
    )  # fmt: skip
    with Container(container) as opened:
        attach(container, opened.manifest, BASELINE_NAME, pack_baseline(baseline))
    names = ("a`![x](y)`b.py", "plain_name.py")
    for name in names:
        tampering.add_listed(container, name, b"x = 1")
    hub.add_repo("base/model", card_data={"license": "other", "license_name": hostile})
    push(container, REPO, level="structure", base_model="base/model")
    body = card_of(hub).text
    escaped = in_markdown(hostile)
    assert body.count(escaped) == 5
    assert f"- {in_markdown(names[0])}, sha256 `" in body
    assert "- `plain_name.py`, sha256 `" in body
    for text in ("<b>", "[a](http://evil)", "![x](y)"):
        assert text not in body.replace(escaped, "")
    assert "# Head" not in body.splitlines()


def test_card_without_a_base(hub, container):
    report = push(container, REPO, level="structure")
    assert "base_model" not in card_of(hub).data.to_dict()
    assert any("--base-model" in text for text in report.warnings)
    report = push(container, REPO, level="structure", base_model="base/missing")
    assert any("base/missing: not found" in text for text in report.warnings)
    hub.add_repo("base/model", card_data=None)
    report = push(container, REPO, level="structure", base_model="base/model")
    assert any("states no licence" in text for text in report.warnings)


def test_own_readme_stays(hub, container):
    (container / "README.md").write_text("---\nlicense: mit\n---\n# My words\n")
    report = push(container, REPO, level="structure")
    assert not report.card
    assert "# My words" in card_of(hub).text
    (container / "README.md").write_text(f"---\nlicense: mit\n---\n{MARKER}\n# Old\n")
    assert push(container, "user/other", level="structure").card
    assert "# Old" not in card_of(hub, "user/other").text


def test_readme_that_somebody_wrote_on_the_hub_stays(hub, container):
    push(container, REPO, level="structure")
    repo = hub.repos[REPO]
    files = repo.commits[repo.refs["main"]]
    edited = {
        **files,
        "README.md": hub.store("README.md", b"---\nlicense: mit\n---\n# Edited in the browser\n"),
    }
    hub.commit(repo, edited, "edit", "main")
    report = push(container, REPO, level="structure")
    assert not report.card
    assert any("stays as it is" in text for text in report.warnings)
    assert "# Edited in the browser" in card_of(hub).text
    (container / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(container, REPO, level="structure")
    assert "# Mine" in card_of(hub).text


# The command line.


def test_push_and_convert_push_as_commands(hub, container, run, tmp_path):
    from tests.integration import tiny_models

    done = run("push", container, REPO, "--level", "checksums", "--json", "--message", "First")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["commit"] == hub.repos[REPO].refs["main"]
    assert hub.repos[REPO].messages[facts["commit"]] == "First"
    source = tiny_models.llama(tmp_path / "source")
    done = run(
        "convert",
        source,
        tmp_path / "out",
        "--no-baseline",
        "--push",
        "user/converted",
        "--private",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    assert "pushed" in done.stdout
    assert hub.repos["user/converted"].private
    assert tree(hub, "user/converted") == names_in(tmp_path / "out") | {"README.md"}


def test_from_a_source_on_the_hub_to_a_card_that_names_it(hub, run, tmp_path):
    from tests.integration import tiny_models

    source = tiny_models.llama(tmp_path / "source", max_shard_size="30KB")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    more = {
        "pytorch_model.bin": b"pickle",
        "README.md": b"---\nlicense: mit\n---\n",
        "LICENSE": b"MIT",
    }
    hub.add_repo(
        "base/tiny", {**files, **more}, card_data={"license": "mit", "license_link": "LICENSE"}
    )
    hub.log.clear()
    done = run(
        "convert",
        "base/tiny",
        tmp_path / "out",
        "--no-baseline",
        "--scheme",
        "lossless",
        "--push",
        REPO,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert not [exchange for exchange in hub.log if "pytorch_model.bin" in exchange.path]
    published = json.loads(done.stdout)["push"]
    commit = hub.repos["base/tiny"].refs["main"]
    data, text = card_of(hub).data.to_dict(), card_of(hub).text
    assert (data["base_model"], data["license"], data["license_link"]) == (
        "base/tiny",
        "mit",
        "LICENSE",
    )
    assert data["tags"] == ["codecllm", "lossless", "zstd"]
    assert f"| source commit | `{commit}` |" in text
    assert published["warnings"] == []
    assert published["commit"] == hub.repos[REPO].refs["main"]
    assert "LICENSE" in tree(hub)
    assert_same_weights(codecllm.from_pretrained(REPO), load_plain(source))


def test_convert_push_finds_out_about_the_token_first(hub, run, tmp_path):
    done = run("convert", tmp_path / "absent", tmp_path / "out", "--push", REPO, token="hf_wrong")
    assert done.returncode == 4
    assert "Invalid credentials" in done.stderr
