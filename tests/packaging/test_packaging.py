"""Checkout, source distribution, wheel and editable install: each holds every module exactly once.

Everything starts from a clone of the last commit, as a user gets it. Nothing is fetched: the build
runs with the setuptools that is installed here. The native core is not compiled, which
`tests/native` does: `CC` is a command that fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIN_SETUPTOOLS = 77
FOLDERS = ("calibrator", "converter", "formats", "hub", "loader", "serving", "verifier")
DATA = {
    "codecllm/calibrator/mixed_text.txt",
    "codecllm/calibrator/rounding.cu",
    "codecllm/loader/kernels/rans.cu",
    "codecllm/py.typed",
    "codecllm/verifier/diagnosis/report/chart.jinja",
    "codecllm/verifier/diagnosis/report/report.html.jinja",
    "codecllm/verifier/evaluation/sample.txt",
}


def _setuptools():
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


pytestmark = [
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
    pytest.mark.skipif(
        _setuptools() < MIN_SETUPTOOLS,
        reason=f"setuptools {MIN_SETUPTOOLS} or newer is not installed",
    ),
]


def _run(*command, cwd):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    environment |= {"CC": "false", "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _build(kind, source, target):
    """Builds a distribution with the build back end of pyproject.toml; returns its path."""
    target.mkdir(parents=True)
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(target)!r}))"
    name = _run(sys.executable, "-c", code, cwd=source).split()[-1]
    return target / name


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "codecllm"
    _run("git", "clone", "--quiet", "--local", str(ROOT), str(folder), cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def modules(clone):
    """Returns the modules of the package by their paths, from the folders where they lie."""
    listed = _run("git", "ls-files", "*.py", cwd=clone).split()
    return {
        path if path.startswith("codecllm/") else f"codecllm/{path}"
        for path in listed
        if path.startswith(("codecllm/", *(f"{folder}/" for folder in FOLDERS)))
    }


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    return _build("sdist", clone, tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    return _build("wheel", clone, tmp_path_factory.mktemp("wheel") / "dist")


def _packaged(names):
    """Returns the modules among names of files; fails where one is there twice."""
    modules = [name for name in names if name.endswith(".py")]
    assert [name for name, count in Counter(modules).items() if count > 1] == []
    return set(modules)


def test_a_clone_has_a_link_for_every_folder(clone, modules):
    links = {path.name for path in (clone / "codecllm").iterdir() if path.is_symlink()}

    assert links == set(FOLDERS)
    for name in FOLDERS:
        assert os.readlink(clone / "codecllm" / name) == f"../{name}"
    assert len(modules) > 200
    assert all((clone / module).is_file() for module in modules)


def test_the_source_distribution_holds_every_module_once(sdist, modules):
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if not member.isdir()]

    held = {name for name in _packaged(names) if name.startswith(("codecllm/", *FOLDERS))}
    assert held == modules
    assert set(names) >= DATA


def test_the_wheel_holds_every_module_once(wheel, modules):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    assert _packaged(names) == modules
    assert set(names) >= DATA
    others = {name for name in names if not name.startswith(("codecllm/", "codecllm-"))}
    assert others == set()


def test_the_wheel_of_the_source_distribution_is_that_of_the_checkout(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    other = _build("wheel", unpacked, tmp_path / "dist")

    assert other.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(other) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        for name in one.namelist():
            assert one.read(name) == two.read(name), name


def test_an_editable_install_reads_the_checkout(clone, modules, tmp_path):
    wheel = _build("editable", clone, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert all(name.startswith("__editable__") for name in _packaged(archive.namelist()))
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r}); "
        "import codecllm; print(codecllm.__path__[0])"
    )

    found = Path(_run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).strip())

    assert found == clone / "codecllm"
    assert all((found.parent / module).is_file() for module in modules)


@pytest.mark.parametrize("kind", ["checkout", "wheel"])
def test_the_command_runs(kind, clone, wheel, tmp_path):
    folder = clone
    if kind == "wheel":
        folder = tmp_path / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)

    text = _run(sys.executable, "-m", "codecllm", "--version", cwd=folder)

    assert re.fullmatch(r"codecllm \d+\.\d+\.\d+, container format \d+\.\d+\n", text)
