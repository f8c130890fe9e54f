"""A fault at any operation of a pull, a push, an export, a signature, a report or a plot."""

from __future__ import annotations

import os
import shutil

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from codecllm.converter import convert
from codecllm.converter.write.staging import STAGING_NAME
from tests.faults.shim import ALL_FAULTS, FAULTS, Server, compile_shim, files_of
from tests.hub_server import HubServer
from tests.integration import tiny_models
from tests.security.keys import write_keys

STOPPED = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGINT twice": 130}
ALL = ["ENOSPC", "EIO", "short", "kill", *STOPPED, "dead"]
REPO = "user/tiny"
pytestmark = pytest.mark.timeout(3600 if ALL_FAULTS else 300)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def serve(hub, tmp_path_factory):
    """A server of command lines whose Hub is `hub`, with its cache in a folder of the caller."""
    scratch = tmp_path_factory.mktemp("shim")
    library = compile_shim(scratch)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(token="hf_writer").items():
            patch.setenv(name, value)
        patch.setenv("HF_HOME", str(scratch))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("MPLCONFIGDIR", str(scratch))
        running = Server(library, scratch)
    yield running
    running.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A source with a tokenizer of sixty words."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("others") / "source")
    vocabulary = {f"w{number}": number for number in range(60)} | {"[UNK]": 60}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def container(model):
    out = model.parent / "container"
    convert(model, out, scheme="int8", include=("*",), max_shard_bytes=60_000)
    return out


def _steps(fault, operations, parts=2):
    """All operations with CODECLLM_ALL_FAULTS, else about `parts`, others for each fault."""
    stride = 1 if ALL_FAULTS else max(1, operations // parts)
    return range(1 + FAULTS.index(fault) % stride, operations + 1, stride)


def _check_end(end, fault, *, in_threads=False):
    """Checks a command that did not succeed."""
    # A signal may come inside a lock of Python's executors, whose threads then log an error, and
    # a finalizer of huggingface_hub's folders logs that it cannot remove one.
    logs = in_threads and fault in (*STOPPED, "dead")
    assert logs or "Traceback" not in end.text, end.text
    assert "error: " in end.text or fault == "kill", end.text
    if fault in STOPPED:
        assert end.code == STOPPED[fault], end.text
    elif fault != "kill":
        assert end.code == 4, end.text


def _is_staged(name):
    return name.startswith((STAGING_NAME, f"out/{STAGING_NAME}"))


def _export(container, base):
    return ["export", container, base / "out", "--workers", "1"]


@pytest.fixture(scope="module")
def exported(serve, container, tmp_path_factory):
    """The files of an export that nothing disturbed, and its operations."""
    base = tmp_path_factory.mktemp("exported")
    whole = serve.run(_export(container, base), base)
    assert whole.code == 0, whole.text
    return files_of(base), whole.count


@pytest.mark.parametrize("fault", ALL)
def test_an_export_is_whole_or_not_there(serve, container, exported, tmp_path, fault):
    expected, count = exported
    for at in _steps(fault, count):
        base = tmp_path / str(at)
        base.mkdir()
        end = serve.run(_export(container, base), base, fault, at)
        files = {name: data for name, data in files_of(base).items() if not _is_staged(name)}
        if end.code:
            _check_end(end, fault)
        if files != expected:
            assert end.code, (fault, at)
            assert "out/config.json" not in files, (fault, at)
            assert fault == "kill" or "could not be removed" in end.text or not files_of(base)
            again = serve.run(_export(container, base), base)
            assert again.code == 0, (fault, at, again.text)
            assert files_of(base) == expected, (fault, at)


@pytest.mark.parametrize("fault", ALL)
@pytest.mark.parametrize("old", [None, b"an older signature"])
def test_a_signature_is_whole_or_the_older_one(serve, container, tmp_path, fault, old):
    pytest.importorskip("model_signing", reason="codecllm[sign] is not installed")
    write_keys(tmp_path, "key")
    base = tmp_path / "base"
    signed = shutil.copytree(container, base / "c")
    before = files_of(signed)
    path = base / "c.sig"
    command = ["sign", signed, "--private-key", tmp_path / "key.pem"]
    checking = ["verify", signed, "--signature", path, "--public-key", tmp_path / "key.pub"]
    whole = serve.run(command, base)
    assert whole.code == 0, whole.text
    assert whole.count >= 6
    for at in _steps(fault, whole.count):
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        end = serve.run(command, base, fault, at)
        assert files_of(signed) == before
        if end.code:
            _check_end(end, fault)
        is_new = path.exists() and path.read_bytes() != old
        if is_new:
            assert serve.run([*checking, "--level", "structure"], base).code == 0, (fault, at)
        else:
            assert end.code, (fault, at)
            assert path.exists() == (old is not None), (fault, at)
        others = {one.name for one in base.iterdir()} - {"c", "c.sig"}
        # A folder that cannot be removed is named.
        assert fault == "kill" or all(one in end.text for one in others), (fault, at, others)
        for name in others:
            os.utime(base / name, (0, 0))
        if others:  # the next signature removes it
            assert serve.run(command, base).code == 0, (fault, at)
            assert {one.name for one in base.iterdir()} == {"c", "c.sig"}, (fault, at)


def _pull(serve, base, *fault):
    command = ["verify", REPO, "--level", "checksums"]
    return serve.run(command, base, *fault, cache=base / "hub")


@pytest.fixture(scope="module")
def pulled(serve, hub, container, tmp_path_factory):
    """The bytes of a published container's files, and the operations of its first pull."""
    base = tmp_path_factory.mktemp("pulled")
    push_end = serve.run(["push", container, REPO, "--level", "structure"], base)
    assert push_end.code == 0, push_end.text
    expected = {
        name: hub.blobs[hub.entry(REPO, name).sha256]
        for name in ("codecllm.json", *(one for one in files_of(container) if one != "README.md"))
    }
    whole = _pull(serve, base)
    assert whole.code == 0, whole.text
    assert whole.count > 20
    return expected, whole.count


@pytest.mark.parametrize("fault", ALL)
def test_a_pull_is_whole_or_goes_on(serve, pulled, tmp_path, fault):
    """What lies in a snapshot of the Hub's cache has its right bytes, whatever happened."""
    expected, count = pulled
    for at in _steps(fault, count):
        base = tmp_path / str(at)
        end = _pull(serve, base, fault, at)
        if end.code:
            _check_end(end, fault, in_threads=True)
        for path in base.glob("hub/models--*/snapshots/*/**/*"):
            if path.is_file():
                assert path.read_bytes() == expected[path.name], (fault, at, path.name)
        again = _pull(serve, base)
        assert again.code == 0, (fault, at, again.text)
        shutil.rmtree(base)


@pytest.mark.parametrize("fault", ALL)
def test_a_push_sends_all_or_nothing(serve, hub, container, tmp_path, fault):
    """The one file that a push writes is the model card, as a whole."""
    sound = files_of(container)
    sound.pop("README.md", None)
    name = f"user/push-{FAULTS.index(fault)}"
    # The first run, in which nothing fails, gives the card.
    whole_card, count = None, 5
    for at in (0, *_steps(fault, count)):
        hub.repos.pop(name, None)
        copy = shutil.copytree(container, tmp_path / str(at))
        (copy / "README.md").unlink(missing_ok=True)
        end = serve.run(
            ["push", copy, name, "--level", "structure"], copy, fault if at else "none", at
        )
        files = files_of(copy)
        card = files.pop("README.md", None)
        if at == 0:
            assert (end.code, end.count) == (0, count), end.text
            whole_card = card
        partial = files.pop("README.md.partial", None)
        assert partial is None or fault in ("kill", "dead"), (fault, at)
        assert files == sound, (fault, at)
        assert card in (None, whole_card), (fault, at)
        if end.code:
            _check_end(end, fault)
            assert name not in hub.repos or "codecllm.json" not in _tree(hub, name), (fault, at)
        else:
            assert "codecllm.json" in _tree(hub, name)


def _tree(hub, name):
    repo = hub.repos[name]
    return repo.commits[repo.refs["main"]]


@pytest.fixture(scope="module")
def operations():
    """The operations of a command that nothing disturbed, by what it writes."""
    return {}


@pytest.mark.parametrize("fault", ALL)
@pytest.mark.parametrize("kind", ["report", "plot"])
def test_a_report_or_a_plot_is_whole_or_the_older_one(
    serve, model, container, operations, tmp_path, kind, fault
):
    if kind == "plot":
        pytest.importorskip("matplotlib", reason="codecllm[plot] is not installed")
    base = tmp_path / "base"
    base.mkdir()
    path = base / ("r.html" if kind == "report" else "r.svg")
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{number % 60}" for number in range(40)))
    commands = {
        "report": ["verify", container, "--source", model, "--diagnose", "--report", path],
        "plot": ["eval", model, container, "--text", text, "--plot", path],
    }
    command = commands[kind]
    ends = b"</html>" if kind == "report" else b"</svg>"
    if kind not in operations:
        whole = serve.run(command, base)
        assert whole.code in (0, 1), whole.text
        assert path.read_bytes().rstrip().endswith(ends)
        assert whole.count >= 4
        operations[kind] = whole.count
    for at in _steps(fault, operations[kind], 1):
        path.write_bytes(b"older")
        end = serve.run(command, base, fault, at)
        content = path.read_bytes()
        assert content == b"older" or content.rstrip().endswith(ends), (fault, at)
        if content == b"older":
            _check_end(end, fault)
        others = {one.name for one in base.iterdir()} - {path.name}
        assert fault in ("kill", "dead") or not others, (fault, at, others)
        for name in others:
            (base / name).unlink()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "CONTAINER", "w1 w2", "--max-new-tokens", "2"],
        ["verify", "CONTAINER"],
        ["info", "CONTAINER", "--json"],
        ["compare", "CONTAINER", "SOURCE"],
        ["eval", "SOURCE", "CONTAINER", "--text", "TEXT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_read_write_nothing(serve, model, container, tmp_path, command):
    (tmp_path / "text").write_text(" ".join(f"w{number % 60}" for number in range(40)))
    places = {"CONTAINER": container, "SOURCE": model, "TEXT": tmp_path / "text"}
    end = serve.run([places.get(one, one) for one in command], model.parent)
    assert end.code == (1 if command[0] == "compare" else 0), end.text
    assert end.count == 0
