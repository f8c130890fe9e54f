"""The kernel is told ahead of a load which bytes it will read."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

from codecllm.formats.files import SafeFile
from codecllm.formats.stored_tensor import PlainTensor
from codecllm.loader.host import announce
from codecllm.loader.host.announce import Announcer


def test_the_kernel_is_told_ahead_once_for_every_byte(tmp_path, monkeypatch):
    """Tensors of 1 MB in the order of their file, then some far behind and in front."""
    spans = []
    monkeypatch.setattr(announce, "ANNOUNCED_BYTES", 8 << 20)
    monkeypatch.setattr(
        announce.os,
        "posix_fadvise",
        lambda _, begin, size, advice: spans.append((begin, begin + size)),
    )
    (tmp_path / "f").write_bytes(b"x")
    with SafeFile(tmp_path, "f") as file:
        announcer = Announcer()
        for place in [*range(40), 90, 10]:
            spans_before = len(spans)
            announcer.announce(
                PlainTensor(SimpleNamespace(source_bytes=1 << 20), file, place << 20)
            )
            ends = [end for _, end in spans]
            assert place == 10 or max(ends) >= (place + 5) << 20, "half of it lies ahead"
            assert len(spans) <= spans_before + 1
        announcer.announce(PlainTensor(SimpleNamespace(source_bytes=0), file, 0))
    assert spans[0] == (0, 9 << 20)
    in_order = [span for span in spans if span[0] < 80 << 20]
    assert all(left[1] == right[0] for left, right in pairwise(in_order[: len(spans) - 2]))
    assert len(spans) < 14
    assert spans[-2:] == [(90 << 20, 99 << 20), (10 << 20, 19 << 20)]
