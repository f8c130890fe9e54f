"""Whole models through the device engine; the device is the CPU (see `machine`)."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial

import pytest
import torch

from codecllm.formats.errors import ChecksumError, UnsupportedEnvironmentError, UsageError
from codecllm.loader import from_pretrained, load
from codecllm.loader.device import engines as engines_module
from codecllm.loader.device import groups
from codecllm.loader.device.chunks import ChunkWork
from codecllm.loader.device.engines import DeviceEngines
from codecllm.loader.resident import on_device as resident
from codecllm.loader.resident.compressed_form import CompressedTensor
from codecllm.loader.resident.on_device import DeviceCompressedTensor
from tests import tampering
from tests.integration.outputs import logits, same_bits
from tests.loader.device.host_streams import HostStreams
from tests.loader.device.machine import CPU, NvcompOfTheHost, with_nvcomp


@pytest.fixture(params=["ahead", "on request"])
def device(request, monkeypatch):
    """Lets `from_pretrained` take the CPU for a device; returns the nvCOMP that counts frames."""
    nvcomp = NvcompOfTheHost()
    engines = partial(DeviceEngines, make_streams=lambda _: HostStreams(), types=("cpu",))
    monkeypatch.setattr(load, "DeviceEngines", engines)
    monkeypatch.setattr(load, "sole_device", lambda *_: CPU if request.param == "ahead" else None)
    monkeypatch.setattr(engines_module, "choose_codecs", lambda *_: with_nvcomp(nvcomp))
    return nvcomp


def _without_device(folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "DeviceEngines", DeviceEngines)
        patch.setattr(load, "sole_device", lambda *_: None)
        return from_pretrained(folder, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_dense_models_have_the_bits_of_the_cpu_path(container, name, scheme, device):
    folder = container(name, scheme)
    model = from_pretrained(folder)
    assert device.frames > 0
    expected = _without_device(folder)
    theirs, ours = expected.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[key], ours[key]) for key in theirs)


def test_int8_models_get_their_codes_through_the_engine(container, device):
    folder = container("llama", "int8")
    model = from_pretrained(folder, resident="int8")
    assert device.frames > 0
    expected = _without_device(folder, resident="int8")
    assert torch.equal(logits(model), logits(expected))


def test_a_damaged_chunk_ends_the_load_with_its_name(container, device, tmp_path):
    folder = tampering.copy_of(container("llama", "lossless"), tmp_path / "copy")
    name = "model.layers.1.mlp.up_proj.weight"
    path, byte = tampering.payload_place(folder, name)
    tampering.flip_bit(path, byte + 9)
    with pytest.raises(ChecksumError, match=name):
        from_pretrained(folder)


def _without_memory(patch, at):
    """Lets the n-th allocation of the device engine fail; returns the list of those that came."""
    real, allocations = torch.empty, []

    def empty(*shape, **options):
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("codecllm.loader.device."):
            allocations.append(shape)
            if len(allocations) == at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*shape, **options)

    patch.setattr(torch, "empty", empty)
    return allocations


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_a_device_without_memory_ends_the_load_wherever_it_is(container, device, scheme):
    folder = container("llama", scheme)
    expected = _without_device(folder).state_dict()
    failed = []
    for at in (1, 2, 3, 5, 8, 13, 21, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            allocations = _without_memory(patch, at)
            try:
                model = from_pretrained(folder)
            except torch.OutOfMemoryError:
                failed.append(at)
                continue
            assert len(allocations) < at
        # Nothing of the loads that failed is left in it.
        ours = model.state_dict()
        assert all(same_bits(expected[key], ours[key]) for key in expected)
    assert len(failed) >= 4
    assert 10_000 not in failed


def test_a_decoder_asked_for_by_name_must_work(container):
    folder = container("llama", "lossless")
    with pytest.raises(UsageError, match="not a value of decoder, got 'gpu'"):
        from_pretrained(folder, decoder="gpu")
    with pytest.raises(
        UnsupportedEnvironmentError, match="decoder 'nvcomp' does not work here: torch finds no GPU"
    ):
        from_pretrained(folder, decoder="nvcomp", device_map="cuda:0")


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
@pytest.mark.parametrize(("name", "scheme"), [("llama", "int8"), ("gpt2", "lossless")])
def test_compressed_models_give_the_logits_of_dense(container, name, scheme, device, monkeypatch):
    monkeypatch.setattr(
        groups, "GROUP_ELEMENTS", 30_000
    )  # several blocks for the vocabulary, several groups for the rest
    folder = container(name, scheme)
    model = from_pretrained(folder, resident="compressed")
    expected = logits(_without_device(folder))
    assert isinstance(model.lm_head.weight.form, DeviceCompressedTensor)
    before = device.frames
    for _ in range(3):  # unknown order, learned order, and once more
        assert torch.equal(logits(model), expected)
    assert device.frames > before


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels of ours", "nvCOMP"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_layers_that_come_again_are_replayed_where_kernels_decode_them(
    container, device, kernels, scheme, monkeypatch
):
    monkeypatch.setattr(groups, "GROUP_ELEMENTS", 30_000)
    counts = {"recorded": 0, "replayed": 0, "decoded": 0}
    decode = resident.DeviceDecoder._decode

    def recorded(streams, stream, work):
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            work()

        return replay

    def counted(*given):
        counts["decoded"] += 1
        decode(*given)

    monkeypatch.setattr(HostStreams, "recorded", recorded)
    monkeypatch.setattr(resident.DeviceDecoder, "_decode", counted)
    if kernels:  # the interpreter takes minutes for as many chunks of rans
        monkeypatch.setattr(ChunkWork, "can_be_recorded", True)
    folder = container("llama", scheme)
    model = from_pretrained(folder, resident="compressed")
    expected = logits(_without_device(folder))
    for _ in range(4):  # learn the order, decode for the first time, record, replay
        counts["decoded"] = counts["replayed"] = 0
        assert torch.equal(logits(model), expected)
    decoder = model.lm_head.weight.form.decoder
    number = len(decoder._groups)
    assert number > 2
    if not kernels:  # nvCOMP is called each time
        assert counts["recorded"] == 0
        return
    assert number <= counts["recorded"] <= 2 * number  # an odd number: each in both buffers
    assert number <= counts["replayed"] <= counts["decoded"] <= number + 2  # and the embedding

    # Another batch may need a larger arena: what was recorded reads freed memory from then on.
    decoder._arena = torch.empty(len(decoder._arena) + 1, dtype=torch.uint8)
    counts["replayed"] = 0
    assert torch.equal(logits(model), expected)
    assert counts["replayed"] == 0
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    assert counts["replayed"] >= number


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
@pytest.mark.parametrize(
    "where",
    [(resident.DeviceDecoder, "_decode"), (HostStreams, "keep")],
    ids=["decode", "describe"],
)
def test_a_pass_that_is_interrupted_leaves_nothing_that_looks_decoded(
    container, device, monkeypatch, where
):
    """At each call of the first passes, which learn the order of layers and describe groups."""
    monkeypatch.setattr(groups, "GROUP_ELEMENTS", 30_000)
    folder = container("llama", "int8")
    expected, real, turns = logits(_without_device(folder)), getattr(*where), 0
    while True:
        model, calls = from_pretrained(folder, resident="compressed"), []

        def interrupted(*given, calls=calls, at=1 + 4 * turns):
            calls.append(given)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupted)
            try:
                for _ in range(2):
                    logits(model)
            except KeyboardInterrupt:
                turns += 1
            else:
                break
        for _ in range(3):
            assert torch.equal(logits(model), expected)
    assert turns > 1


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
def test_a_compressed_weight_can_be_had_and_copied(container, device):
    folder = container("llama", "int8")
    model = from_pretrained(folder, resident="compressed")
    assert same_bits(model.lm_head.weight, _without_device(folder).lm_head.weight)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_a_compressed_model_of_a_device_travels_as_one_of_the_cpu(container, device, scheme):
    model = from_pretrained(container("llama", scheme), resident="compressed")
    form = model.lm_head.weight.form
    assert isinstance(form, DeviceCompressedTensor)
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied.lm_head.weight.form) is CompressedTensor
    sides = sum(side.nbytes for side in form.sides)
    assert copied.lm_head.weight.form.nbytes == form.nbytes - sides
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize("device", ["ahead"], indirect=True)
def test_a_compressed_model_refuses_to_be_recorded(container, device, monkeypatch):
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    monkeypatch.setattr(HostStreams, "capturing", lambda self: True)
    with pytest.raises(UnsupportedEnvironmentError, match="cannot be recorded in a CUDA graph"):
        logits(model)
