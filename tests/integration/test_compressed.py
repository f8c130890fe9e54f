"""resident="compressed": the results of dense loading, from payloads in memory."""

from __future__ import annotations

import copy
import gc
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.engine import Request
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.resident import compressed_form
from tests import tampering
from tests.integration import tiny_models
from tests.integration.outputs import coded_weights, in_experts_loop, logits, same_bits
from tests.sources import write_source

NAMES = sorted(tiny_models.MAKERS)
CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_dense(container, name, scheme):
    folder = container(name, scheme)
    dense, compressed = from_pretrained(folder), from_pretrained(folder, resident="compressed")
    assert type(compressed) is type(dense)
    assert coded_weights(compressed)
    assert torch.equal(logits(compressed), logits(in_experts_loop(dense)))
    assert not any(value.is_meta for value in compressed.state_dict().values())


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_every_compressed_weight_is_the_dense_one(container, scheme):
    folder = container("llama", scheme)
    dense, compressed = from_pretrained(folder), from_pretrained(folder, resident="compressed")
    coded = coded_weights(compressed)
    linear = [
        f"{name}.weight"
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    assert sorted(coded) == sorted(linear)
    assert all(same_bits(weight, dense.get_parameter(name)) for name, weight in coded.items())


def test_generate_with_cache_gives_the_tokens_of_dense(container):
    folder = container("qwen3", "int8")
    prompt = {
        "input_ids": torch.arange(5, 12)[None],
        "attention_mask": torch.ones(1, 7, dtype=torch.int64),
    }
    options = {"max_new_tokens": 8, "do_sample": False}
    dense = from_pretrained(folder).generate(**prompt, **options)
    assert torch.equal(
        from_pretrained(folder, resident="compressed").generate(**prompt, **options), dense
    )


def test_tied_modules_share_one_payload(container):
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.form.kind == "compressed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes(container, dtype):
    folder = container("llama", "int8")
    expected = logits(from_pretrained(folder, dtype=dtype))
    assert torch.equal(
        logits(from_pretrained(folder, dtype=dtype, resident="compressed")), expected
    )
    moved = from_pretrained(folder, resident="compressed").to(dtype)
    assert same_bits(moved.lm_head.weight, from_pretrained(folder, dtype=dtype).lm_head.weight)


def test_payload_is_the_stored_one_and_nothing_else_is_kept(container):
    """The model holds plain tensors, and the shards' bytes for the rest."""
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert total == model.get_memory_footprint()
    payloads = [
        int(weight.form.stored.table.offsets[-1])
        for weight in dict.fromkeys(coded_weights(model).values())
    ]
    dense = sum(
        parameter.nbytes for parameter in from_pretrained(container("llama", "int8")).parameters()
    )
    assert sum(payloads) < total < 0.6 * dense


def test_a_vocabulary_larger_than_the_scratch_is_multiplied_in_bands(monkeypatch, container):
    folder = container("llama", "lossless")
    model = from_pretrained(folder, resident="compressed")
    whole = logits(model)
    monkeypatch.setattr(compressed_form, "SCRATCH_ELEMENTS", 1)
    torch.testing.assert_close(logits(model), whole)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_memory_that_threads_may_still_write_to_is_not_used_again(container, monkeypatch, at):
    """As after two Ctrl-C in a forward pass: the second ends the wait for running threads."""
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    expected, decode, outs = logits(model), compressed_form.CompressedTensor.decode_bands, []

    def interrupted(self, bands, dtype, out):
        outs.append(out)
        if len(outs) == at + 1:
            raise KeyboardInterrupt
        decode(self, bands, dtype, out)

    with monkeypatch.context() as patch:
        patch.setattr(compressed_form.CompressedTensor, "decode_bands", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    left = outs[at]

    def checked(self, bands, dtype, out):
        assert out.untyped_storage().data_ptr() != left.untyped_storage().data_ptr()
        decode(self, bands, dtype, out)

    monkeypatch.setattr(compressed_form.CompressedTensor, "decode_bands", checked)
    assert torch.equal(logits(model), expected)


def _matrices(tmp_path, rows=640, cols=320):
    generator = np.random.default_rng(3)
    values = (generator.standard_normal((rows, cols)) * 0.05).astype(np.float32)
    return convert(
        write_source(tmp_path / "s", {"w": ("F32", values)}),
        tmp_path / "c",
        scheme="int8",
        include=("*",),
    ).out


def _tensor(folder):
    with Container(folder) as opened:
        tensor, payload = compressed_form.SharedDecoder(2).hold(opened.tensor("w"))
        with closing(HostEngine(opened, 1)) as engine:
            engine.take(Request("w", "payload", out=payload)).get()
        return tensor


def test_rows_are_gathered_in_the_order_asked(tmp_path):
    folder = _matrices(tmp_path, 3000, 320)
    tensor = _tensor(folder)
    assert tensor.bands > 3
    whole = tensor.dense(torch.float32, CPU)
    rows = torch.tensor([2999, 0, 5, 5, 1500, 410, 409, 2998])
    assert torch.equal(tensor.gather(rows, torch.float32, CPU), whole[rows])
    assert tensor.gather(rows[:0], torch.float32, CPU).shape == (0, 320)


@pytest.mark.parametrize("elements", [1 << 25, 1])
def test_gradients_are_those_of_a_linear_layer(tmp_path, monkeypatch, elements):
    monkeypatch.setattr(compressed_form, "SCRATCH_ELEMENTS", elements)
    folder = _matrices(tmp_path, 3000, 320)
    tensor = _tensor(folder)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 320, generator=generator).requires_grad_()
    bias = torch.randn(3000, generator=generator).requires_grad_()
    upstream = torch.randn(2, 3, 3000, generator=generator)
    weight = tensor.dense(torch.float32, CPU)
    expected = torch.autograd.grad(
        functional.linear(inputs, weight, bias), (inputs, bias), upstream
    )
    output = tensor.linear(inputs, bias)
    tensor.linear(
        torch.zeros(1, 320), None
    )  # the scratch is used again before the gradients are asked for
    for got, wanted in zip(
        torch.autograd.grad(output, (inputs, bias), upstream), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_threads_may_share_a_model(container):
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    expected, results = logits(model), []
    threads = [threading.Thread(target=lambda: results.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_a_copy_of_the_model_works(container):
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight.form is model.lm_head.weight.form
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_damaged_chunk_is_named_and_nothing_is_returned(tmp_path, container, name):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, name))
    with pytest.raises(ChecksumError) as caught:
        from_pretrained(folder, resident="compressed")
    assert (caught.value.tensor, caught.value.chunk) == (name, 0)


def test_damage_in_memory_is_found_when_the_layer_runs(container):
    model = from_pretrained(container("llama", "int8"), resident="compressed")
    payload = model.model.layers[1].mlp.up_proj.weight.form.stored.file.payload
    payload[7] ^= 1
    with pytest.raises(ChecksumError, match=r"layers\.1\.mlp\.up_proj"):
        logits(model)
    payload[7] ^= 1
    assert torch.isfinite(logits(model)).all()


def test_no_thread_outlives_the_model(container):
    model = from_pretrained(container("llama", "int8"), resident="compressed", workers=2)
    logits(model)
    ended = model.lm_head.weight.form.decoder.workers._queue.ended
    assert not ended.done
    del model
    gc.collect()
    assert ended.wait(20)


def test_it_is_not_saved_as_if_it_were_plain(tmp_path, container):
    with pytest.raises(UsageError, match="codecllm convert"):
        from_pretrained(container("llama", "int8"), resident="compressed").save_pretrained(
            tmp_path / "plain"
        )


def test_a_container_without_coded_tensors_is_a_usage_error(tmp_path, tiny):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    save_file({"norm": torch.ones(4)}, source / "model.safetensors")
    convert(source, tmp_path / "c", scheme="lossless")
    with pytest.raises(UsageError, match="coded tensors"):
        from_pretrained(tmp_path / "c", resident="compressed")
