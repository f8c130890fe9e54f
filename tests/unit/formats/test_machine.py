"""Pauses of the search for reference cycles: nested, in several threads, ended by an error."""

from __future__ import annotations

import gc
import threading

import pytest

from codecllm.formats.machine import without_garbage_collection


@pytest.fixture(autouse=True)
def _collecting():
    assert gc.isenabled()
    yield
    gc.enable()


def test_the_search_pauses_and_goes_on():
    with without_garbage_collection():
        assert not gc.isenabled()
        with without_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_search_that_the_caller_turned_off_stays_off():
    gc.disable()
    with without_garbage_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_the_search_goes_on_after_an_error():
    with pytest.raises(KeyboardInterrupt), without_garbage_collection():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_pauses_of_two_threads_overlap():
    begun, may_end = threading.Event(), threading.Event()

    def pause():
        with without_garbage_collection():
            begun.set()
            assert may_end.wait(20)

    other = threading.Thread(target=pause)
    other.start()
    assert begun.wait(20)
    with without_garbage_collection():
        may_end.set()
        other.join()
        assert not gc.isenabled()
    assert gc.isenabled()
