"""No command compiles, imports or runs Python files of a container, for any config or flag."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import codecllm
from codecllm.formats.checksums import sha256_hex
from codecllm.loader.hf.plain import load_plain
from tests.integration import tiny_models
from tests.tampering import copy_of, reseal

EVIL = """
import os, pathlib
pathlib.Path(os.environ["CANARY"]).write_text("run")
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()
def generate(*args, **kwargs): return None
"""
REMOTE = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor"),
    "evil.Evil",
) | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
# Runs commands, each an argument list, and writes one line for each Python file of the container
# that is compiled, run, or copied to transformers' folder of modules. (Hashing a listed file opens
# it, which is fine.)
WATCHED = """
import json, os, sys
folder, log, commands = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
cache = os.environ["HF_MODULES_CACHE"]
report = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def watch(event, args):
    path = args[0] if event == "open" and isinstance(args[0], str) else ""
    if path.endswith(".py") and path.startswith(cache):
        os.write(report, f"open {args[0]}\\n".encode())
    elif event == "compile" and str(args[1]).startswith((folder, cache)):
        os.write(report, f"compile {args[1]}\\n".encode())
    elif event == "exec" and args[0].co_filename.startswith((folder, cache)):
        os.write(report, f"exec {args[0].co_filename}\\n".encode())
    elif event == "import" and args[0].split(".")[-1] == "evil":
        os.write(report, f"import {args[0]}\\n".encode())
sys.addaudithook(watch)
from codecllm.cli import main
for command in commands:
    sys.argv = ["codecllm", *command]
    try:
        main()
    except SystemExit as done:
        assert done.code in (None, 0, 1, 2, 3, 5), (command, done.code)
"""


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile")
    source = tiny_models.llama(base / "source")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(source)
    codecllm.convert(source, base / "out", baseline=False)
    return base / "out"


def _edit_json(path, **values):
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | values))


def _relist(folder, added=()):
    """Lists every changed and added file with its true digest: only the content is hostile."""

    def edit(document):
        listed = [record["name"] for record in document["files"]]
        template = document["files"][0]
        for name in added:
            if name not in listed:
                document["files"].append(dict(template, name=name))
        for record in document["files"]:
            data = (folder / record["name"]).read_bytes()
            record.update(bytes=len(data), sha256=sha256_hex(data))
        document["files"].sort(key=lambda record: record["name"])

    reseal(folder, edit)


def _tokenizer_of_the_folder(folder):
    _edit_json(folder / "tokenizer_config.json", auto_map=REMOTE, tokenizer_class="Evil")


def _every_config(folder):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _edit_json(folder / name, auto_map=REMOTE)


def _model_of_the_folder(folder):
    _edit_json(folder / "config.json", auto_map=REMOTE, model_type="evil", architectures=["Evil"])


def _auto_class(folder):
    _edit_json(folder / "config.json", auto_map=REMOTE, architectures=["AutoModelForCausalLM"])


def _custom_generate(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)
    _edit_json(folder / "generation_config.json", custom_generate=str(folder))


def _chat_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.environ.update(X='1') }}{% include 'evil.py' %}"
    )


HOSTILE = [
    _tokenizer_of_the_folder,
    _every_config,
    _model_of_the_folder,
    _auto_class,
    _custom_generate,
    _chat_template,
]


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_code_of_a_container_is_never_run(container, tmp_path, hostile, listed):
    folder = copy_of(container, tmp_path / "out")
    (folder / "evil.py").write_text(EVIL)
    hostile(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    new = [name for name in names if not (container / name).exists() and not name.endswith(".py")]
    _relist(folder, [*new, "evil.py"] if listed else new)
    log, canary = tmp_path / "log", tmp_path / "canary"
    out = str(folder)
    commands = [
        ["generate", out, "a b", "--max-new-tokens", "2"],
        ["verify", out],
        ["eval", out, out],
        ["info", out],
    ]
    environment = {
        **os.environ,
        "CANARY": str(canary),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, out, str(log), json.dumps(commands)],
        input="y\n" * 20, capture_output=True, text=True, check=False, timeout=600, env=environment,
    )  # fmt: skip
    assert log.read_text() == ""
    assert not canary.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


PARTS = {
    "model_type": "encoder-decoder",
    "architectures": ["EncoderDecoderModel"],
    "is_encoder_decoder": True,
    "encoder": {"model_type": "bert", "num_hidden_layers": 1},
    # No class of transformers makes text with it: what `auto_map` names would be fetched and run.
    "decoder": {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "evil/repo--evil.Evil"}},
}


@pytest.fixture
def answers(monkeypatch):
    """What transformers asks on the terminal; every answer is yes."""
    questions = []

    def ask(text=""):
        questions.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    return questions


@pytest.mark.parametrize(
    "load", [codecllm.from_pretrained, hf.AutoModel.from_pretrained, load_plain]
)
def test_code_of_a_part_of_the_config_is_never_asked_for(container, tmp_path, answers, load):
    folder = copy_of(container, tmp_path / "out")
    document = json.loads((folder / "config.json").read_text())
    document = {"quantization_config": document["quantization_config"]} | PARTS
    if load is load_plain:  # a source, for its baseline
        document.pop("quantization_config")
        (folder / "codecllm.json").unlink()
    (folder / "config.json").write_text(json.dumps(document))
    if load is not load_plain:
        _relist(folder)
    with pytest.raises(Exception, match="ViTConfig"):
        load(folder)
    assert not answers
