"""Loaded models in common use: adapters, compilation, offloading, progress."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr

import accelerate
import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError, UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.load import Load
from codecllm.loader.resident import form, int8_matmul
from tests.integration.outputs import logits

RESIDENTS = ("dense", "int8", "compressed")


@pytest.mark.parametrize("resident", RESIDENTS)
def test_lora_trains_one_step(container, resident):
    torch.manual_seed(0)
    model = from_pretrained(container("llama", "int8"), resident=resident)
    before = logits(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    )
    assert torch.equal(logits(model), before)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    ids = torch.arange(10, 26)[None]
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in trained.values()]
        assert all(
            gradient is not None and torch.isfinite(gradient).all() for gradient in gradients
        )
        optimizer.step()
    assert sum(bool(gradient.any()) for gradient in gradients) == 8
    assert losses[-1] < losses[0]


def test_gradients_through_every_resident_are_those_of_dense(container):
    found = {}
    for resident in RESIDENTS:
        model = from_pretrained(
            container("llama", "int8"), resident=resident, dtype=torch.float32
        ).requires_grad_(False)
        embeddings = torch.linspace(-1, 1, 8 * 64).reshape(1, 8, 64).requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        found[resident] = embeddings.grad
    torch.testing.assert_close(found["int8"], found["dense"])
    torch.testing.assert_close(found["compressed"], found["dense"])


@pytest.fixture
def compiler():
    """Forgets compiled code afterwards."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("resident", RESIDENTS)
def test_the_forward_compiles_without_a_graph_break(container, compiler, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(input_ids=ids, use_cache=False).logits, expected, rtol=0.02, atol=0.02
        )


def test_to_the_compiler_an_int8_product_is_one_operation(container, compiler):
    """The kernel is chosen by facts that no compiler can follow: addresses, installed libraries."""
    operations = []
    model = from_pretrained(container("llama", "int8"), resident="int8")
    ids = torch.arange(3, 23).reshape(2, 10)

    def lowered(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=lowered), fullgraph=True)
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert operations.count("codecllm.int8_linear.default") == linear > 4


CODED = ("int8", "compressed")


@pytest.mark.parametrize("resident", CODED)
def test_an_export_is_refused_until_the_weights_are_plain(container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident, dtype=torch.float32)
    layer, inputs = model.model.layers[0].mlp, torch.linspace(-1, 1, 128).view(2, 64)
    with torch.no_grad():
        expected = layer(inputs)
        with pytest.raises(UsageError, match=r"model\.dequantize\(\)"):
            torch.export.export(layer, (inputs,))
        with pytest.raises(UsageError, match=r"up_proj.*model\.dequantize\(\)"):
            torch.jit.trace(layer.up_proj, inputs)
        with pytest.raises(UsageError, match=r"embed_tokens.*model\.dequantize\(\)"):
            torch.jit.trace(model.model.embed_tokens, torch.tensor([[1, 2]]))
        model.dequantize()
        exported = torch.export.export(layer, (inputs,)).module()
        torch.testing.assert_close(exported(inputs), expected)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of torch's own tracer
def test_a_traced_product_is_refused_or_stays_that_of_its_layer(container):
    """The memory of one layer's values is that of the next one's where weights stay compressed."""
    for resident in CODED:
        model = from_pretrained(container("llama", "int8"), resident=resident, dtype=torch.float32)
        layer, other = (model.model.layers[n].mlp.up_proj for n in (0, 1))
        inputs = torch.linspace(-1, 1, 128).view(2, 64)
        if resident == "compressed":
            for trace in (make_fx(layer), lambda x, f=layer: torch.func.linearize(f, x)):
                with pytest.raises(UsageError, match=r"up_proj.*model\.dequantize\(\)"):
                    trace(inputs)
            continue
        traced = make_fx(layer)(inputs)
        _, tangent = torch.func.linearize(layer, inputs)
        other(inputs)
        assert torch.equal(traced(inputs), layer(inputs))
        torch.testing.assert_close(tangent(2 * inputs), layer(2 * inputs))


def test_saved_graphs_find_no_weight_of_another_process():
    """A form is found by a number, and no two processes have the same numbers."""
    command = "from codecllm.loader.resident import form; print(next(form._numbers))"
    run = [sys.executable, "-c", command]
    number = int(subprocess.run(run, check=True, capture_output=True).stdout)
    assert abs(number - next(form._numbers)) > 1 << 32
    with pytest.raises(UsageError, match="compile again"):
        torch.ops.codecllm.coded_linear(torch.ones(1, 64), None, number)


@pytest.mark.parametrize("resident", CODED)
def test_functional_gradients_are_those_of_dense(container, resident):
    found = {}
    for how in ("dense", resident):
        model = from_pretrained(container("llama", "int8"), resident=how, dtype=torch.float32)
        values = {name: value.detach() for name, value in model.named_parameters()}
        name = "model.layers.0.mlp.up_proj.weight"

        def loss(weight, model=model, values=values, name=name):
            ids = torch.arange(3, 13)[None]
            return torch.func.functional_call(model, {**values, name: weight}, (ids,)).logits.sum()

        found[how] = torch.func.grad(loss)(values[name] + 0)
    torch.testing.assert_close(found[resident], found["dense"])


@pytest.mark.parametrize("col_scale", [None, torch.linspace(0.5, 2, 64)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 32).bfloat16()])
def test_that_operation_is_what_it_tells_the_compiler(bias, col_scale):
    codes = (torch.arange(2048) % 255 - 127).to(torch.int8).view(32, 64)
    given = (
        torch.linspace(-1, 1, 192).bfloat16().view(3, 64),
        codes,
        torch.linspace(1, 2, 32),
        bias,
        col_scale,
    )
    torch.library.opcheck(torch.ops.codecllm.int8_linear, given)
    assert torch.equal(torch.ops.codecllm.int8_linear(*given), int8_matmul.int8_product(*given))


@pytest.mark.parametrize("resident", RESIDENTS)
def test_layers_offloaded_to_host_memory_by_accelerate(container, resident, monkeypatch):
    monkeypatch.setattr(int8_matmul, "PACKED_ROWS", 0)
    model = from_pretrained(container("llama", "int8"), resident=resident)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(tensor.is_meta for tensor in model.model.layers[0].parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("device_map", ["auto", "sequential", "cpu", {"": "cpu"}])
def test_device_maps(container, resident, device_map, monkeypatch):
    monkeypatch.setattr(int8_matmul, "PACKED_ROWS", 0)
    model = from_pretrained(container("llama", "int8"), resident=resident, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(from_pretrained(container("llama", "int8"))))


@pytest.mark.parametrize("resident", RESIDENTS)
def test_layers_offloaded_to_disk(tmp_path, container, resident, monkeypatch):
    monkeypatch.setattr(int8_matmul, "PACKED_ROWS", 0)
    folder = container("llama_untied", "int8")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
    }
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = from_pretrained(folder, resident=resident, device_map=places, offload_folder=tmp_path)
    assert any("layers.1.mlp" in path.name for path in tmp_path.iterdir())
    assert torch.equal(logits(model), logits(from_pretrained(folder)))


LITTLE = {"device_map": "auto", "max_memory": {"cpu": "100KB"}}


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("name", ["llama", "llama_untied"])
@pytest.mark.parametrize("places", [LITTLE, {"device_map": {"": "disk"}}], ids=["auto", "whole"])
def test_all_of_a_model_offloaded_to_disk(tmp_path, container, resident, name, places, monkeypatch):
    """Also into a folder in which the weights of another model lie."""
    monkeypatch.setattr(int8_matmul, "PACKED_ROWS", 0)
    for scheme in ("lossless", "int8") if resident != "int8" else ("int8", "int8"):
        folder = container(name, scheme)
        model = from_pretrained(folder, resident=resident, offload_folder=tmp_path, **places)
        assert set(model.hf_device_map.values()) == {"disk"}
        assert all(tensor.is_meta for tensor in model.parameters())
        assert torch.equal(logits(model), logits(from_pretrained(folder)))


@pytest.mark.parametrize("resident", [*RESIDENTS, "auto"])
def test_the_disk_needs_a_folder(container, resident, monkeypatch):
    folder = container("llama", "int8")
    if resident in ("int8", "compressed"):
        with pytest.raises(UsageError, match="offload_folder"):
            from_pretrained(folder, resident=resident, **LITTLE)
    monkeypatch.setattr(Load, "__init__", lambda *_: pytest.fail("the container was opened"))
    for places in ({"": "disk"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(UsageError, match="offload_folder"):
            from_pretrained(folder, resident=resident, device_map=places)


MAPS = {
    "incomplete": {"lm_head": "disk"},
    "no module": {"": "cpu", "nothing.here": "disk"},
    "pattern": {"model.layers.*": "disk", "": "cpu"},
    "twice": {"model.layers.0": "cpu", "model.layers": "disk", "model": "cpu", "lm_head": "cpu"},
}


@pytest.mark.parametrize("resident", ["int8", "compressed"])
@pytest.mark.parametrize("name", MAPS)
def test_a_map_that_accelerate_does_not_take_is_one_error(tmp_path, container, resident, name):
    folder = container("llama", "int8")
    with pytest.raises(UsageError, match="accelerate takes no such map"):
        from_pretrained(
            folder, resident=resident, device_map=MAPS[name], offload_folder=tmp_path / "f"
        )


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
@pytest.mark.parametrize("name", [5, "", b"x", "FILE"])
def test_an_offload_folder_that_is_none(tmp_path, container, resident, name):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CodecLLMError):
        from_pretrained(
            container("llama", "int8"),
            resident=resident,
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=file if name == "FILE" else name,
        )


def _calls(folder, **options):
    calls = []
    from_pretrained(folder, progress=lambda *call: calls.append(call), **options)
    return calls


@pytest.mark.parametrize("resident", RESIDENTS)
def test_progress_counts_every_byte_of_the_weights_once(container, resident):
    folder = container("llama", "int8")
    with Container(folder) as opened:
        names = {record.name for record in opened.manifest.tensors if record.scheme != "alias"}
        total = opened.manifest.source.tensor_bytes
    calls = _calls(folder, resident=resident)
    assert {name for name, _, _ in calls} == names
    assert len(calls) == len(names)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {size for _, _, size in calls} == {total}
    assert calls[-1][1] == total


@pytest.mark.parametrize(("progress", "words"), [(True, "loading"), (False, "")])
def test_progress_bar_is_drawn_where_asked(container, monkeypatch, progress, words):
    folder = container("llama", "int8")  # converted here: saving its model draws a bar of its own
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stderr(io.StringIO()) as stderr:
        from_pretrained(folder, progress=progress)
    assert words in stderr.getvalue()
    assert "Loading weights" not in stderr.getvalue()
    assert bool(stderr.getvalue()) == progress


@pytest.mark.parametrize("name", ["llama", "llama_untied", "t5"])
@pytest.mark.parametrize("resident", CODED)
def test_the_hubs_library_saves_decoded_values_and_tied_ones_once(
    tmp_path, container, resident, name
):
    model = from_pretrained(container(name, "int8"), resident=resident)
    plain = from_pretrained(container(name, "int8"), resident="dense")
    saved = []
    for number, one in enumerate((model, plain)):
        (tmp_path / str(number)).mkdir()
        huggingface_hub.save_torch_state_dict(one.state_dict(), tmp_path / str(number))
        saved.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[1].items():
        assert torch.equal(saved[0][key], value), key
