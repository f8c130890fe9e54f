"""Failures of the Hub: one line, an exit code, no traceback; the same facts with --json."""

from __future__ import annotations

import json

import pytest

from codecllm.formats.errors import HubError
from codecllm.hub import check_login, open_remote, read_base_model, resolve
from codecllm.publishing import push

REPO = "user/tiny"
UNREACHABLE = "http://127.0.0.1:9"
COMMANDS = ("convert", "eval")
NO_URL = "http://[::1"

CASES = {
    "gated": ({"token": "hf_reader"}, "gated: ask for access"),
    "gated, not logged in": ({"token": None}, "gated: ask for access"),
    "missing": ({"repo": "user/absent"}, "not found on the Hub"),
    "private": (
        {"token": "hf_reader", "repo": "user/hidden"},
        "not found on the Hub (or private: log in",
    ),
    "wrong token": ({"token": "hf_wrong"}, "the Hub refuses the token"),
    "no such revision": ({"revision": "v9"}, "no such revision: 'v9'"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "not in the local cache, and offline mode is on"),
    "unreachable": ({"HF_ENDPOINT": UNREACHABLE}, "the Hub cannot be reached"),
    "no URL": ({"HF_ENDPOINT": NO_URL}, "HF_ENDPOINT is no URL (Invalid IPv6 URL), got 'http"),
    "no port": ({"HF_ENDPOINT": "http://127.0.0.1:99999"}, "HF_ENDPOINT is no URL (Port out of"),
    "no container": ({"repo": "user/plain"}, "holds no codecllm.json"),
}


@pytest.fixture
def repositories(hub, container):
    push(container, REPO, level="structure")
    push(container, "user/hidden", level="structure", private=True)
    hub.add_repo("user/plain", {"config.json": b"{}"})
    hub.repos[REPO].gated = True


@pytest.mark.parametrize("command", ["info", "verify"])
@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(repositories, run, command, case):
    options, words = CASES[case]
    options = dict(options)
    more = ["--revision", options.pop("revision")] if "revision" in options else []
    done = run(command, options.pop("repo", REPO), *more, cache="empty", **options)
    assert done.returncode == (1 if case == "no container" else 4), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_the_same_facts_as_json(repositories, run):
    done = run("info", "user/absent", "--json")
    facts = json.loads(done.stdout)
    assert (facts["error"], facts["file"], facts["exit_code"]) == ("HubError", "user/absent", 4)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": None}, "no Hub token: log in"),
        ({"token": "hf_wrong"}, "the Hub refuses the token"),
        ({"token": "hf_reader"}, "the token may not do this"),
        ({"HF_ENDPOINT": UNREACHABLE}, "the Hub cannot be reached"),
        ({"HF_ENDPOINT": NO_URL}, "HF_ENDPOINT is no URL"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is on"),
    ],
)
def test_push_fails_in_one_line(container, run, options, words):
    done = run("push", container, "user/new", "--level", "structure", "-q", **options)
    assert done.returncode == 4
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]


def test_approved_users_read_gated_repositories(repositories, hub, run):
    hub.approved.add("reader")
    assert run("verify", REPO, "--level", "checksums", token="hf_reader").returncode == 0
    hub.repos[REPO].gated = False
    assert run("info", REPO, token=None).returncode == 0


def test_what_was_fetched_once_works_offline(repositories, run):
    assert run("verify", REPO, "--level", "checksums").returncode == 0
    for command in (["verify", REPO, "--level", "checksums"], ["info", REPO]):
        assert run(*command, HF_HUB_OFFLINE="1").returncode == 0
    assert run("verify", REPO, "--level", "checksums", HF_ENDPOINT=UNREACHABLE).returncode == 0


@pytest.mark.parametrize(
    ("command", "endpoint"),
    [
        *((command, NO_URL) for command in ("info", "verify", "compare", "generate", "convert")),
        ("info", "http://[x]"),
        ("info", "http://a\u2100b"),
    ],
)
def test_an_endpoint_that_is_no_url(container, lossless, run, tmp_path, command, endpoint):
    # Of local folders too: the libraries that load models read the variable when they are imported.
    more = {"compare": [lossless], "generate": ["a"], "convert": [tmp_path / "out"]}
    done = run(command, container, *more.get(command, []), HF_ENDPOINT=endpoint)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: HF_ENDPOINT is no URL (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_needs_no_endpoint(run, command):
    done = run(*command, "--help", HF_ENDPOINT=NO_URL)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_wrong_options_are_said_before_the_endpoint(run):
    done = run("convert", "--nothing", HF_ENDPOINT=NO_URL)
    assert done.returncode == 2
    assert "--nothing" in done.stderr


@pytest.mark.parametrize("function", [resolve, open_remote, read_base_model, check_login])
def test_functions_check_the_environment(function, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NO_URL)
    with pytest.raises(HubError, match="HF_ENDPOINT is no URL"):
        function("user/name")


@pytest.mark.parametrize("text", ["abc", "", "-1", "1.5", "1e3", "9" * 20])
@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_limits_of_time_are_whole_numbers(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(HubError, match=f"{name} is no number of seconds"):
        resolve("user/name")


@pytest.mark.parametrize("command", ["info", "verify", "compare"])
def test_a_limit_of_time_that_is_none(container, lossless, run, command):
    more = {"compare": [lossless]}
    done = run(command, container, *more.get(command, []), HF_HUB_DOWNLOAD_TIMEOUT="abc")
    assert done.returncode == 4
    assert done.stderr.startswith("error: HF_HUB_DOWNLOAD_TIMEOUT is no number of seconds, got 'ab")
    assert len(done.stderr.splitlines()) == 1
