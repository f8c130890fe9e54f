"""A coded weight is a tensor: reads give its values, writes work or raise one typed error."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from codecllm.formats.errors import UsageError
from codecllm.loader.resident import coded_weight
from codecllm.loader.resident.cell import Cell
from codecllm.loader.resident.coded_weight import CodedWeight, settle, write
from codecllm.loader.resident.handlers import BELOW_AUTOGRAD
from tests.loader.resident import spawned
from tests.loader.resident.cases import COLS, ROWS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = torch.linspace(-1, 1, 3 * COLS).view(3, COLS)

READS = {
    "sum": lambda t: t.sum(),
    "norm": lambda t: torch.linalg.norm(t, dim=1),
    "add": lambda t: t + 1,
    "radd": lambda t: 1 + t,
    "equal": lambda t: t == t[0, 0],
    "row": lambda t: t[3],
    "part": lambda t: t[2:7:2, 1:],
    "rows": lambda t: t[torch.tensor([5, 0, 5])],
    "mask": lambda t: t[t > 0],
    "last": lambda t: t[-1, -1].item(),
    "transposed": lambda t: t.T.contiguous(),
    "product": lambda t: INPUTS @ t.T,
    "einsum": lambda t: torch.einsum("nk,mk->nm", INPUTS, t),
    "addmm": lambda t: torch.addmm(torch.ones(3, ROWS), INPUTS, t.t()),
    "flat": lambda t: t.view(-1)[5],
    "bits": lambda t: t.view(torch.int32)[1],
    "chunks": lambda t: torch.stack(t.chunk(2)),
    "cat": lambda t: torch.cat([t, t], 1),
    "double": lambda t: t.double(),
    "clone": lambda t: t.clone() * 1,
    "svd": lambda t: torch.linalg.svdvals(t),
    "qr": lambda t: torch.linalg.qr(t).R,
    "unbind": lambda t: t.unbind()[4],
    "expand": lambda t: t[None].expand(2, -1, -1),
    "reshape": lambda t: t.reshape(2, -1, COLS),
    "detach": lambda t: t.detach()[1],
    "list": lambda t: torch.tensor(t.tolist()),
    "array": lambda t: torch.from_numpy(np.asarray(t).copy()),
    "iteration": lambda t: torch.stack(list(t)),
    "zeros": lambda t: torch.zeros_like(t),
    "new": lambda t: t.new_zeros(3),
    "where": lambda t: torch.where(t > 0, t, torch.zeros_like(t)),
    "linear": lambda t: functional.linear(INPUTS, t, torch.ones(ROWS)),
    "as inputs": lambda t: functional.linear(t, torch.ones(3, COLS)),
    "with itself": lambda t: functional.linear(t, t),
    "integers": lambda t: (t * 100).to(torch.int32) + t.to(torch.int32),
    "embedding": lambda t: functional.embedding(torch.tensor([[3, 0], [23, 3]]), t, padding_idx=3),
    "bag": lambda t: functional.embedding_bag(torch.tensor([[3, 0], [23, 3]]), t),
    "pad": lambda t: functional.pad(t, (1, 1)),
    "cosine": lambda t: functional.cosine_similarity(t[:3], INPUTS),
}


@pytest.mark.parametrize("inference", [False, True])
def test_every_read_gives_the_values(case, inference):
    for name, use in READS.items():
        weight = case.weight()
        with torch.inference_mode(inference):
            got, expected = use(weight), use(case.plain())
        torch.testing.assert_close(got, expected, msg=name)
        assert weight.form is case.form, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once_to_each_dtype(case, dtype):
    weight = case.weight(dtype)
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert (weight.shape, weight.dtype, weight.numel()) == ((ROWS, COLS), dtype, ROWS * COLS)
    assert torch.equal(weight, case.values.to(dtype))
    for other in DTYPES:
        cast = weight.to(other)
        assert (cast.dtype, cast.form) == (other, case.form)
        assert torch.equal(cast, case.values.to(other))
    rows = torch.tensor([7, 7, 0])
    assert torch.equal(functional.embedding(rows, weight), case.values[rows].to(dtype))


def _through_numbers(tensor):
    tensor.view(-1)[7] = 3.0


def _given(tensor):
    tensor.data = tensor.data * 2


def _augmented(tensor):
    tensor.data += 1


def _into(tensor):
    torch.mul(tensor, 3, out=tensor)


WRITES = {
    "add": lambda t: t.add_(1),
    "number": _through_numbers,
    "row": lambda t: t.__setitem__(2, 0),
    "part": lambda t: t[1:9:3, 2:].fill_(5),
    "transposed": lambda t: t.T[1].zero_(),
    "data": lambda t: t.data.mul_(2),
    "augmented data": _augmented,
    "row of data": lambda t: t.data[0].copy_(torch.ones(COLS)),
    "detached": lambda t: t.detach().sub_(1),
    "copied": lambda t: t.copy_(torch.ones(ROWS, COLS)),
    "given": _given,
    "out": _into,
    "initialised": nn.init.zeros_,
    "random": lambda t: t.normal_(generator=torch.Generator().manual_seed(1)),
    "indices": lambda t: t.index_add_(0, torch.tensor([1, 2]), torch.ones(2, COLS)),
    "masked": lambda t: t.masked_fill_(t > 0, 0),
    "second chunk": lambda t: t.chunk(2)[1].zero_(),
    "unbound": lambda t: t.unbind()[3].neg_(),
    "diagonal": lambda t: t.diagonal().fill_(9),
    "together": lambda t: torch._foreach_add_([t, torch.ones(2)], 1),
    "clamped": lambda t: t.clamp_(min=0),
    "bits": lambda t: t.view(torch.int32)[0].zero_(),
    "squeezed": lambda t: t[None].squeeze(0).exp_(),
}


@pytest.mark.parametrize("inference", [False, True])
def test_every_write_is_done_and_leaves_a_plain_parameter(case, inference):
    for name, change in WRITES.items():
        layer, tied = nn.Linear(COLS, ROWS, bias=False), nn.Embedding(ROWS, COLS)
        layer.weight = tied.weight = weight = case.weight()
        kept = case.weight()
        expected = case.plain()
        with torch.inference_mode(inference), torch.no_grad():
            change(weight)
            change(expected)
        assert torch.equal(weight, expected), name
        assert type(weight) is nn.Parameter, name
        assert layer.weight is weight and tied.weight is weight, name
        assert torch.equal(layer(INPUTS), functional.linear(INPUTS, expected)), name
        assert torch.equal(kept, case.values), name


RESHAPES = {
    "t_": lambda t: t.t_(),
    "transpose_": lambda t: t.transpose_(0, 1),
    "swapaxes_": lambda t: t.swapaxes_(0, 1),
    "swapdims_": lambda t: t.swapdims_(-1, 0),
    "unsqueeze_": lambda t: t.unsqueeze_(1),
    "squeeze_": lambda t: t.unsqueeze_(0).squeeze_(),
    "squeeze_ of one": lambda t: t.unsqueeze_(0).squeeze_(0),
    "squeeze_ of several": lambda t: t.unsqueeze_(0).squeeze_((0, 1)),
    "as_strided_": lambda t: t.as_strided_((2, 2), (COLS, 1), 3),
    "twice": lambda t: t.t_().unsqueeze_(2).transpose_(1, 2),
    "detach_": lambda t: t.detach_(),
}
"""Operators that give one object another shape over the memory that it shares."""

ALIASES = {
    "data": lambda t: t.data,
    "detached": lambda t: t.detach(),
    "part": lambda t: t.data[:3, :3],
    "transposed": lambda t: t.data.T,
    "row of one": lambda t: t.data[2:3],
}


@pytest.mark.parametrize("made", ALIASES)
@pytest.mark.parametrize("name", RESHAPES)
def test_another_shape_of_an_alias_leaves_the_weight(case, name, made):
    weight, plain = case.weight(), nn.Parameter(case.plain(), requires_grad=False)
    outcomes = []
    for owner in (weight, plain):
        part = ALIASES[made](owner)
        try:
            result = RESHAPES[name](part)
        except RuntimeError as exc:  # out of bounds of a part
            outcomes.append(str(exc)[:20])
            continue
        assert result is part
        outcomes.append((part.shape, part.stride(), (part + 0).tolist()))
    assert outcomes[0] == outcomes[1]
    assert weight.form is case.form
    assert torch.equal(weight, plain) and weight.shape == plain.shape
    assert torch.equal(functional.linear(INPUTS, weight), functional.linear(INPUTS, plain))
    part = RESHAPES["t_"](weight.data)
    part[1].zero_()
    assert torch.equal(weight[:, 1], torch.zeros(ROWS))


@pytest.mark.parametrize("name", RESHAPES)
def test_another_shape_of_the_weight_itself(case, name):
    weight, plain = case.weight(), nn.Parameter(case.plain(), requires_grad=False)
    with torch.no_grad():
        RESHAPES[name](weight), RESHAPES[name](plain)
    assert torch.equal(weight, plain) and isinstance(weight, nn.Parameter)
    assert torch.equal(copy.deepcopy(weight), plain)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(weight, plain + 1)


def test_other_memory_is_refused(case):
    for change in (
        lambda t: t.set_(torch.zeros(2, 2)),
        lambda t: t.resize_(2, 2),
        lambda t: t.resize_as_(torch.zeros(2, 2)),
    ):
        weight = case.weight()
        with pytest.raises(UsageError, match="keeps its memory"), torch.no_grad():
            change(weight.data)
        assert torch.equal(weight, case.values)


def test_every_operator_that_gives_another_shape_is_known():
    """A new one would give another shape to every alias."""
    others = {"swapdims_", "swapaxes_", "rename_"}  # composite ones; names, of older torch
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or not name.endswith("_") or name in others:
            continue
        operator = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default", None)
        if operator is not None and torch.Tag.inplace_view in operator.tags:
            assert operator in BELOW_AUTOGRAD, operator


def test_products_into_a_given_tensor(case):
    for linear in (functional.linear, torch._C._nn.linear):
        out = torch.empty(3, ROWS)
        linear(INPUTS, case.weight(), out=out)
        assert torch.equal(out, functional.linear(INPUTS, case.values))
    weight, plain = case.weight(), case.plain()
    factors = torch.linspace(1, 2, ROWS)[:, None], torch.linspace(0, 1, COLS)[None]
    for target in (weight, plain):
        with torch.no_grad():
            torch.kron(*factors, out=target)
    assert torch.equal(weight, plain)


def test_first_writes_of_several_threads_are_all_done(case, monkeypatch):
    """Each thread decodes only behind the others' first write."""
    weight, expected = case.weight(), case.plain()
    barrier, read = threading.Barrier(4), Cell.read

    def slow_read(cell):
        values = read(cell)
        time.sleep(0.02)
        return values

    monkeypatch.setattr(Cell, "read", slow_read)

    def change(number):
        barrier.wait()
        with torch.no_grad():
            weight.data[number].mul_(2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    expected[:4] *= 2
    assert torch.equal(weight, expected)


def test_a_read_beside_another_threads_first_write(case, monkeypatch):
    """The weight becomes plain while a product looks at it."""
    weight, calls = case.weight(), []
    matrix = CodedWeight.matrix.fget

    def written_meanwhile(tensor):
        if not calls:
            calls.append(None)
            write(weight, "was written to").mul_(2)
            assert settle(weight)
        return matrix(tensor)

    monkeypatch.setattr(CodedWeight, "matrix", property(written_meanwhile))
    with torch.no_grad():
        got = functional.linear(INPUTS, weight)
    assert calls and type(weight) is nn.Parameter
    assert torch.equal(got, functional.linear(INPUTS, case.plain() * 2))


def test_an_alias_that_was_made_before_sees_the_write(case):
    weight = case.weight()
    alias, row = weight.data, weight.detach()[4]
    weight.data.add_(1)
    assert torch.equal(alias, case.values + 1)
    assert torch.equal(row, case.values[4] + 1)
    row.zero_()
    assert not weight[4].any()
    alias[0].fill_(2)
    assert (weight[0] == 2).all()


def test_becoming_dense_is_said_in_one_line(case, caplog):
    coded_weight._reported.clear()
    with caplog.at_level(logging.WARNING, logger="codecllm"):
        for _ in range(3):
            case.weight().data.add_(1)
        case.weight().clone().add_(1)
    (record,) = caplog.records
    assert "tensor 'w' was written to and lies dense in memory from now on" in record.getMessage()


def test_training_changes_the_weight_as_that_of_a_plain_layer(case):
    layers = []
    for weight in (case.weight(), case.plain()):
        layer = nn.Linear(COLS, ROWS)
        nn.init.ones_(layer.bias)
        layer.weight = weight
        layer.requires_grad_(True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(INPUTS).square().sum().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        layers.append(layer)
    assert type(layers[0].weight) is nn.Parameter
    assert not torch.equal(layers[0].weight, case.values)
    for got, expected in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_frozen_weight_passes_gradients_on_and_gets_none(case):
    found = []
    for weight in (case.weight(), case.plain()):
        layer = nn.Linear(COLS, ROWS)
        nn.init.zeros_(layer.bias)
        layer.weight = weight
        inputs = INPUTS.clone().requires_grad_()
        (layer(inputs).sigmoid().sum() + (inputs @ weight.T).square().sum()).backward()
        assert weight.grad is None
        found.append((inputs.grad, layer.bias.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_weight_that_other_code_watches_is_right_too(case):
    """Then the object cannot become a plain one: its operations run on the dense memory."""
    weight, expected = case.weight(), case.plain()
    watcher = weakref.ref(weight)
    weight.data.add_(1)
    weight[2].zero_()
    expected.add_(1)[2].zero_()
    assert watcher() is weight
    assert type(weight) is CodedWeight
    assert torch.equal(weight, expected)
    assert torch.equal(functional.linear(INPUTS, weight), functional.linear(INPUTS, expected))
    for one in (weight, expected):
        one.requires_grad_(True)
        functional.linear(INPUTS, one).square().sum().backward()
        torch.optim.SGD([one], lr=0.1).step()
    assert torch.equal(weight, expected)
    with pytest.raises(UsageError, match="keeps shape, dtype and device"):
        weight.data = torch.ones(2, 2)
    weight.requires_grad_(False)
    weight.data = torch.ones(ROWS, COLS)
    assert weight.sum() == ROWS * COLS


def test_copies_share_the_form_until_one_is_written_to(case):
    layer = nn.Linear(COLS, ROWS)
    layer.weight = case.weight()
    twin = copy.deepcopy(layer)
    assert twin.weight.form is case.form
    assert isinstance(twin.weight, nn.Parameter)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(layer.weight, case.values)
    assert not twin.weight.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pickling_keeps_the_form(case, dtype):
    layer = nn.Linear(COLS, ROWS, dtype=dtype)
    layer.weight = case.weight(dtype)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert isinstance(again.weight, CodedWeight)
        assert isinstance(again.weight, nn.Parameter)
        assert torch.equal(again.weight, layer.weight)
        assert again.weight.nbytes == layer.weight.nbytes
        assert torch.equal(again(INPUTS.to(dtype)), layer(INPUTS.to(dtype)))
    with torch.no_grad():
        layer.weight[0] = 1
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)
    part = pickle.loads(pickle.dumps(case.weight(dtype)[2:4]))
    assert type(part) is torch.Tensor
    assert torch.equal(part, case.values[2:4].to(dtype))


def test_int8_weights_pass_the_safe_loader(cases):
    buffer = io.BytesIO()
    torch.save({"w": cases["columns"].weight()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["w"]
    assert isinstance(loaded, CodedWeight)
    assert torch.equal(loaded, cases["columns"].values)


def test_a_spawned_process_gets_weights_and_shares_their_memory(cases):
    layers = {name: nn.Linear(COLS, ROWS) for name in cases}
    for name, layer in layers.items():
        layer.weight = cases[name].weight()
        layer.requires_grad_(False).share_memory()
        assert layer.weight.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=spawned.answer, args=(layers, INPUTS, results))
    process.start()
    answers = results.get()
    process.join()
    assert process.exitcode == 0
    for name, (output, kind, shared) in answers.items():
        assert (kind, shared) == ("CodedWeight", True)
        assert np.array_equal(output, layers[name](INPUTS).numpy())


def test_state_dicts_of_both_kinds_load(case):
    coded, plain = nn.Linear(COLS, ROWS, bias=False), nn.Linear(COLS, ROWS, bias=False)
    coded.weight = case.weight()
    plain.load_state_dict(coded.state_dict())
    assert torch.equal(plain.weight, case.values)
    other = nn.Linear(COLS, ROWS, bias=False)
    other.weight = case.weight()
    with torch.no_grad():
        other.weight.zero_()
    other.load_state_dict(coded.state_dict())
    assert torch.equal(other.weight, case.values)
    with torch.no_grad():
        plain.weight.fill_(2)
    coded.load_state_dict(plain.state_dict())
    assert (coded.weight == 2).all()
    third = nn.Linear(COLS, ROWS, bias=False)
    third.weight = case.weight()
    assigned = nn.Linear(COLS, ROWS, bias=False, device="meta").requires_grad_(False)
    assigned.load_state_dict(third.state_dict(), assign=True)
    assert assigned.weight.form is case.form


def test_a_parameter_of_an_alias_shares_the_memory(case):
    weight = case.weight()
    other = nn.Parameter(weight.data)
    assert other.requires_grad
    assert isinstance(other, nn.Parameter)
    functional.linear(INPUTS, other).sum().backward()
    torch.optim.SGD([other], lr=1).step()
    assert type(other) is nn.Parameter
    assert torch.equal(weight, other)
    assert not torch.equal(weight, case.values)
    frozen = nn.Parameter(case.weight().data, requires_grad=False)
    assert frozen.form is case.form


def test_safetensors_writes_the_values(tmp_path, case):
    layer = nn.Linear(COLS, ROWS, dtype=torch.bfloat16)
    layer.weight = case.weight(torch.bfloat16)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "values")
    saved = safetensors.torch.load_file(tmp_path / "values")
    assert torch.equal(saved["weight"], case.values.bfloat16())
    safetensors.torch.save_model(layer, tmp_path / "model")
    saved = safetensors.torch.load_file(tmp_path / "model")
    assert torch.equal(saved["weight"], case.values.bfloat16())
    with pytest.raises(UsageError, match=r"tensor 'w'.*state_dict"):
        safetensors.torch.save_file(dict(layer.named_parameters()), tmp_path / "parameters")


def test_memory_is_that_of_the_form(case):
    weight = case.weight()
    assert weight.nbytes == case.form.nbytes
    assert weight.nelement() * weight.element_size() == pytest.approx(case.form.nbytes)
    assert weight.detach().element_size() == 4
    weight.data.add_(1)
    assert (weight.nbytes, weight.element_size()) == (ROWS * COLS * 4, 4)


def test_addresses_tell_weights_apart_and_point_nowhere(case):
    weight, other = case.weight(), case.weight()
    places = {weight.data_ptr(): "a", other.data_ptr(): "b"}
    assert places[weight.data_ptr()] == "a"
    assert weight.data_ptr() == 0
    assert weight.data_ptr() != other.data_ptr()
    array = np.asarray(weight)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_memory_that_another_library_may_write_to_is_that_of_the_weight(case):
    weight = case.weight()
    torch.from_dlpack(weight)[0] = 7
    assert (weight[0] == 7).all()


def test_casts_and_moves_of_a_module_keep_the_form(case):
    layer = nn.Linear(COLS, ROWS)
    tied = nn.Embedding(ROWS, COLS)
    layer.weight = tied.weight = case.weight(torch.bfloat16)
    both = nn.ModuleList([layer, tied]).to(torch.float16).float().to("cpu").eval()
    assert layer.weight is tied.weight
    assert (layer.weight.form, layer.weight.dtype) == (case.form, torch.float32)
    assert torch.equal(layer.weight, case.values)
    assert both.to("meta")[0].weight.is_meta
    assert type(tied.weight) is nn.Parameter


def test_inputs_of_another_dtype_are_refused_as_by_a_plain_layer(case):
    for weight in (case.weight(torch.bfloat16), case.plain(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="same dtype"):
            functional.linear(INPUTS, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_as_a_plain_layer(case, dtype):
    bias = torch.ones(ROWS, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = INPUTS.repeat(16, 1)  # more rows than the kernel for few takes
        got = functional.linear(inputs, case.weight(dtype), bias)
        assert torch.equal(got, functional.linear(inputs, case.plain(dtype), bias))
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_outside_of_a_vocabulary_are_refused(case, row):
    with pytest.raises(IndexError, match="out of range"):
        functional.embedding(torch.tensor([0, row]), case.weight())


def test_embeddings_with_a_largest_norm_write_to_their_weight(case):
    tables = []
    for weight in (case.weight(), case.plain()):
        table = nn.Embedding(ROWS, COLS, max_norm=0.01)
        table.weight = weight
        table(torch.tensor([1, 2]))
        tables.append(table.weight)
    assert torch.equal(*tables)
    assert tables[0][1].norm() < 0.011


def test_weight_norm_and_pruning_take_the_values(case):
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        outputs = []
        for weight in (case.weight(), case.plain()):
            layer = nn.Linear(COLS, ROWS)
            nn.init.ones_(layer.bias)
            layer.weight = weight
            torch.manual_seed(0)
            outputs.append(change(layer).eval()(INPUTS))
        assert torch.equal(*outputs)


def test_averages_and_flat_vectors_of_parameters(case):
    layer = nn.Linear(COLS, ROWS, bias=False)
    layer.weight = case.weight()
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    layer.weight.data.zero_()
    average.update_parameters(layer)
    assert torch.equal(average.module.weight, case.values / 2)
    other = nn.Linear(COLS, ROWS, bias=False)
    other.weight = case.weight()
    vector = nn.utils.parameters_to_vector(other.parameters())
    assert torch.equal(vector, case.values.flatten())
    nn.utils.vector_to_parameters(vector * 2, other.parameters())
    assert torch.equal(other(INPUTS), functional.linear(INPUTS, case.values * 2))


def test_functional_calls_take_coded_and_other_weights(case):
    layer = nn.Linear(COLS, ROWS, bias=False)
    layer.weight = case.weight()
    doubled = torch.func.functional_call(layer, {"weight": layer.weight * 2}, (INPUTS,))
    assert torch.equal(doubled, functional.linear(INPUTS, case.values * 2))
    same = torch.func.functional_call(layer, dict(layer.named_parameters()), (INPUTS,))
    assert torch.equal(same, layer(INPUTS))


def test_memory_that_a_weight_does_not_have_is_an_error(case):
    """torch asks nobody before it hands out the address, which is zero."""
    weight = case.weight()
    for part in (weight, weight.detach(), weight[1:]):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.utils.dlpack.to_dlpack(part.detach())
