"""PEFT on every residency: training, merging and saving give the bits of a dense model."""

from __future__ import annotations

import copy

import peft
import pytest
import tokenizers.models
import torch
import transformers

from codecllm.loader import from_pretrained
from tests.integration.outputs import coded_weights, logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: advice

CODED = ("int8", "compressed")
TARGETS = ["q_proj", "down_proj"]
PLAIN_INIT = {"init_weights": False, "target_modules": TARGETS}
IDS = torch.arange(10, 26)[None]

MERGING = {
    "lora": peft.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, target_modules=TARGETS),
    "rslora": peft.LoraConfig(
        r=4, init_lora_weights=False, use_rslora=True, target_modules=TARGETS
    ),
    "lora of embeddings and head": peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["embed_tokens", "lm_head"]
    ),
    "dora of embeddings": peft.LoraConfig(
        r=4, init_lora_weights=False, use_dora=True, target_modules=["embed_tokens"]
    ),
    "trainable tokens": peft.TrainableTokensConfig(
        token_indices=[3, 12], init_weights=False, target_modules=["embed_tokens"]
    ),
    "loha": peft.LoHaConfig(r=4, **PLAIN_INIT),
    "lokr": peft.LoKrConfig(r=4, **PLAIN_INIT),
    "adalora": peft.AdaLoraConfig(
        init_r=4, total_step=10, init_lora_weights=False, target_modules=TARGETS
    ),
    "oft": peft.OFTConfig(oft_block_size=8, **PLAIN_INIT),
    "boft": peft.BOFTConfig(boft_block_size=8, **PLAIN_INIT),
    "hra": peft.HRAConfig(r=4, **PLAIN_INIT),
    "vera": peft.VeraConfig(r=4, init_weights=False, target_modules=["q_proj", "o_proj"]),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **PLAIN_INIT),
    "ia3": peft.IA3Config(
        init_ia3_weights=False, target_modules=TARGETS, feedforward_modules=["down_proj"]
    ),
    "randlora": peft.RandLoraConfig(r=4, init_weights=False, target_modules=["q_proj", "o_proj"]),
    "miss": peft.MissConfig(r=4, init_weights=False, target_modules=["q_proj"]),
    "shira": peft.ShiraConfig(r=4, init_weights=False, target_modules=TARGETS),
    "vblora": peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=16, topk=2, target_modules=TARGETS
    ),
    "c3a": peft.C3AConfig(block_size=8, **PLAIN_INIT),
    "delora": peft.DeloraConfig(r=4, **PLAIN_INIT),
}

STARTING = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa in few steps": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa of the head": {"init_lora_weights": "pissa", "target_modules": ["lm_head"]},
}


def _load(container, resident, name="llama_untied"):
    return from_pretrained(container(name, "int8"), resident=resident, dtype=torch.float32)


def _adapted(container, resident, config, **options):
    model = _load(container, resident)
    torch.manual_seed(0)
    return peft.get_peft_model(model, copy.deepcopy(config), **options).eval()


def _state(model):
    return {name: value + 0 for name, value in model.state_dict().items()}


def _same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", MERGING)
def test_a_merged_adapter_is_in_the_weights(container, method):
    """The merged weights are those of a dense model, bit for bit, and give the same logits."""
    merged = {}
    for resident in ("dense", *CODED):
        model = _adapted(container, resident, MERGING[method])
        with_adapter = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
        model = _adapted(container, resident, MERGING[method]).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
        merged[resident] = _state(model)
        if resident != "dense":
            assert 0 < len(coded_weights(model)) < len(coded_weights(_load(container, resident)))
    base = _load(container, "dense").state_dict()
    assert not all(torch.equal(merged["dense"][name], value) for name, value in base.items())
    for resident in CODED:
        _same(merged[resident], merged["dense"])


@pytest.mark.parametrize("start", STARTING)
def test_a_start_that_changes_the_base_leaves_the_output_alone(container, start):
    options = {"r": 4, "target_modules": TARGETS, **STARTING[start]}
    states = {}
    for resident in ("dense", *CODED):
        model = _adapted(container, resident, peft.LoraConfig(**options))
        torch.testing.assert_close(
            logits(model), logits(_load(container, resident)), rtol=1e-3, atol=1e-4
        )
        states[resident] = _state(model)
    for resident in CODED:
        _same(states[resident], states["dense"])


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_trained_beside_an_adapter(tmp_path, container, tied):
    """`modules_to_save`, saved and loaded again onto a dense model."""
    name = "llama" if tied else "llama_untied"
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    states = {}
    for resident in ("dense", *CODED):
        model = from_pretrained(container(name, "int8"), resident=resident, dtype=torch.float32)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert sum("modules_to_save" in key for key in trained) == 2
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert all(value.grad is not None for value in trained.values())
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / resident)
        states[resident] = {key: value.detach().clone() for key, value in trained.items()}
        expected = logits(model.eval())
        dense = from_pretrained(container(name, "int8"), dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(dense, tmp_path / resident).eval()
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    for resident in CODED:
        for key, value in states["dense"].items():
            torch.testing.assert_close(states[resident][key], value, msg=key)


@pytest.mark.parametrize("resident", CODED)
def test_an_adapter_of_a_dense_model_runs_on_every_residency(tmp_path, container, resident):
    """PEFT stores embedding and head of the base beside adapters of these: they become dense."""
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "embed_tokens", "lm_head"]
    )
    dense = _adapted(container, "dense", config)
    dense.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(_load(container, resident), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert len(coded_weights(model)) == len(coded_weights(_load(container, resident))) - 2
    direct = _load(container, resident)
    direct.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(direct), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="RANDOM"
        ),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompts_and_norms_are_tuned_as_on_a_dense_model(container, config):
    outputs, shares = [], []
    for resident in ("dense", *CODED):
        model = _adapted(container, resident, config)
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert gradients
        assert all(gradient is not None for gradient in gradients)
        shares.append(model.get_nb_trainable_parameters())
        outputs.append(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)
    assert len(set(shares)) == 1
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[0] + index, "labels": IDS[0] + index}


def test_trainer_saves_checkpoints_and_resumes(tmp_path, container):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    states = {}
    for resident in ("dense", *CODED):
        options = {
            "output_dir": tmp_path / resident,
            "save_steps": 2,
            "per_device_train_batch_size": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 0.01,
        }
        whole = _adapted(container, resident, config)
        arguments = transformers.TrainingArguments(max_steps=4, **options)
        transformers.Trainer(whole, arguments, train_dataset=_Rows()).train()
        resumed = _adapted(container, resident, config)
        trainer = transformers.Trainer(resumed, arguments, train_dataset=_Rows())
        trainer.train(resume_from_checkpoint=str(tmp_path / resident / "checkpoint-2"))
        trained = {key: p.detach() for key, p in whole.named_parameters() if p.requires_grad}
        after = dict(resumed.named_parameters())
        for key, value in trained.items():
            torch.testing.assert_close(after[key].detach(), value, msg=key)
        states[resident] = trained
    for resident in CODED:
        for key, value in states["dense"].items():
            torch.testing.assert_close(states[resident][key], value, msg=key)


def test_preparing_for_quantized_training_keeps_weights_coded(container):
    model = peft.prepare_model_for_kbit_training(_load(container, "int8").to(torch.bfloat16))
    assert len(coded_weights(model)) == len(coded_weights(_load(container, "int8")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_transformers_loads_the_folder_of_an_adapter(tmp_path, container, scheme):
    """It loads the base model that the adapter names, then the adapter, in one call."""
    folder = container("llama", scheme)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS)
    adapted = peft.get_peft_model(base, config)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    without = logits(plain)
    plain.load_adapter(str(tmp_path / "adapter"))
    expected = logits(plain)  # the adapter in bfloat16; it was trained in float32
    assert (expected - trained).abs().max() < 0.3 * (without - trained).abs().max()
    for reader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        assert torch.equal(logits(reader.from_pretrained(tmp_path / "adapter")), expected)
    for resident in ("dense", "compressed", *(["int8"] if scheme == "int8" else [])):
        model = from_pretrained(folder, resident=resident)
        model.load_adapter(str(tmp_path / "adapter"))
        assert resident == "dense" or coded_weights(model)
        if resident != "int8":
            assert torch.equal(logits(model), expected)
        difference = (logits(model) - expected).abs().max()
        assert difference <= 0.06 * expected.abs().max()
    named = transformers.pipeline(
        "text-generation", model=str(tmp_path / "adapter"), tokenizer=_tokenizer()
    )
    assert torch.equal(logits(named.model), expected)


@pytest.fixture
def process_group(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("resident", CODED)
@pytest.mark.parametrize("keeps", [False, True])
def test_data_parallel_training(container, process_group, resident, keeps):
    """DDP broadcasts, which writes to every weight that it is not told to ignore."""
    results = {}
    for how in ("dense", resident):
        model = from_pretrained(container("llama", "int8"), resident=how, dtype=torch.float32)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS)
        adapted = peft.get_peft_model(model, config)
        coded = set(coded_weights(adapted))
        parallel = torch.nn.parallel.DistributedDataParallel
        if keeps:
            frozen = [name for name, value in adapted.named_parameters() if not value.requires_grad]
            parallel._set_params_and_buffers_to_ignore_for_model(adapted, frozen)
        parallel(adapted)(input_ids=IDS, labels=IDS).loss.backward()
        assert set(coded_weights(adapted)) == (coded if keeps else set())
        results[how] = {
            name: value.grad for name, value in adapted.named_parameters() if value.requires_grad
        }
    assert results["dense"].keys() == results[resident].keys()
    for name, grad in results["dense"].items():
        torch.testing.assert_close(results[resident][name], grad)


def _tokenizer():
    words = {f"w{number}": number for number in range(512)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)
