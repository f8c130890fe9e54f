"""Tiny models of many architectures in folders whose tensors have the names of published files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.integration import tiny_models
from tests.integration.tiny_models import COMMON, EXPERTS, GROUPED, TEXT_ONLY

Tensors = dict[str, torch.Tensor]
ENCODER = {
    key: value for key, value in COMMON.items() if key not in ("bos_token_id", "eos_token_id")
}
SEQUENCE: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **TEXT_ONLY,
}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **TEXT_ONLY,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 32,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
ROPE_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def renamed(**rules: str) -> Callable[[Tensors], None]:
    """Returns a change of names: each rule's pattern (a regular expression) becomes its value."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            new = name
            for pattern, replacement in rules.items():
                new = re.sub(pattern, replacement, new)
            tensors[new] = tensors.pop(name)

    return change


def old_layer_norms(tensors: Tensors) -> None:
    """LayerNorm as `gamma` and `beta`, and the buffer of positions: BERT's first files."""
    renamed(**{r"LayerNorm\.weight$": "LayerNorm.gamma", r"LayerNorm\.bias$": "LayerNorm.beta"})(
        tensors
    )
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]


def old_weight_norm(tensors: Tensors) -> None:
    """Weight norm as `weight_g` and `weight_v`: nearly all published files of speech models."""
    renamed(
        **{
            r"parametrizations\.weight\.original0": "weight_g",
            r"parametrizations\.weight\.original1": "weight_v",
        }
    )(tensors)


def gpt2_masks(tensors: Tensors) -> None:
    """GPT-2's first files: no `transformer.` prefix, masks as tensors, no head."""
    renamed(**{r"^transformer\.": ""})(tensors)
    tensors.pop("lm_head.weight", None)
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))


def inverse_frequencies(tensors: Tensors) -> None:
    """Rotary frequencies of each layer, as the first Llama files have them."""
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = 1.0 / 10000.0 ** (torch.arange(8) / 8)


def neox_masks(tensors: Tensors) -> None:
    """GPT-NeoX's files hold masks and frequencies of each layer."""
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{prefix}.bias"] = torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.bool))
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.rand(2)


def spare_layer(tensors: Tensors) -> None:
    """A layer for predicting several tokens at once, behind the last one, as in DeepSeek-V3."""
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("layers.1.", "layers.61.")] = tensors[name] * 2


def _qwen_vl(kind: str) -> Any:
    text = {**GROUPED, "rope_parameters": ROPE_SECTIONS}
    ids = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502}
    if kind == "qwen2_vl":
        vision = {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 64, "patch_size": 4}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        return hf.Qwen2VLForConditionalGeneration(config)
    vision = {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "intermediate_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _llava() -> Any:
    return tiny_models._vision()


def _paligemma() -> Any:
    config = hf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={"model_type": "gemma", **GROUPED, "head_dim": 16},
        image_token_index=511,
        projection_dim=64,
        hidden_size=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _clip() -> Any:
    text = {**VISION, "vocab_size": 512, "max_position_embeddings": 64, "eos_token_id": 2}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    return hf.CLIPModel(config)


def _gemma2() -> Any:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=16))


def _mamba2() -> Any:
    config = hf.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=16, n_groups=1,
        expand=2, chunk_size=8, **TEXT_ONLY,
    )  # fmt: skip
    return hf.Mamba2ForCausalLM(config)


def _jamba() -> Any:
    config = hf.JambaConfig(
        **GROUPED, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
        use_mamba_kernels=False,
    )  # fmt: skip
    return hf.JambaForCausalLM(config)


def _deepseek_v2() -> Any:
    config = hf.DeepseekV2Config(
        **{**EXPERTS, "num_key_value_heads": 4}, n_routed_experts=4, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, topk_method="greedy", n_group=1, topk_group=1,
    )  # fmt: skip
    return hf.DeepseekV2ForCausalLM(config)


def _falcon_mamba() -> Any:
    config = hf.FalconMambaConfig(
        hidden_size=64, num_hidden_layers=2, state_size=8, use_mambapy=False, **TEXT_ONLY
    )
    return hf.FalconMambaForCausalLM(config)


def _sentence_encoder() -> Any:
    return hf.BertModel(hf.BertConfig(**ENCODER), add_pooling_layer=False)


Layout = tuple[Callable[[], Any], torch.dtype, Callable[[Tensors], None] | None]
LAYOUTS: dict[str, Layout] = {
    # decoders
    "llama_with_inv_freq": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), torch.float16, inverse_frequencies,
    ),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)), torch.bfloat16, None),
    "qwen3_embedding": (  # saved as the base model, without `model.`
        lambda: hf.Qwen3Model(hf.Qwen3Config(**GROUPED, head_dim=16)), torch.bfloat16, None,
    ),
    "gemma": (
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=16)), torch.bfloat16, None,
    ),
    "gemma2": (_gemma2, torch.bfloat16, None),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)), torch.bfloat16, None),
    "olmo2": (lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)), torch.float32, None),
    "cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)), torch.float16, None),
    "granite": (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED)), torch.bfloat16, None),
    "starcoder2": (
        lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GROUPED)), torch.bfloat16, None,
    ),
    "stablelm": (lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)), torch.float16, None),
    "smollm3": (lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**GROUPED)), torch.bfloat16, None),
    "glm4": (
        lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=16)), torch.bfloat16, None,
    ),
    "gpt2_old": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TEXT_ONLY)
        ),
        torch.float32, gpt2_masks,
    ),
    "gptj": (
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, **TEXT_ONLY)
        ),
        torch.float16, None,
    ),
    "gpt_neox_masks": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON)), torch.float16, neox_masks,
    ),
    "bloom_without_prefix": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **TEXT_ONLY)
        ),
        torch.bfloat16, renamed(**{r"^transformer\.": ""}),
    ),
    "opt_without_prefix": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=64, max_position_embeddings=64, **TEXT_ONLY,
            )
        ),
        torch.float16, renamed(**{r"^model\.decoder\.": "decoder."}),
    ),
    # experts and latent attention
    "qwen2_moe": (
        lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=32)
        ),
        torch.bfloat16, None,
    ),
    "olmoe": (
        lambda: hf.OlmoeForCausalLM(
            hf.OlmoeConfig(
                **{**GROUPED, "num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2
            )
        ),
        torch.bfloat16, None,
    ),
    "deepseek_v2": (_deepseek_v2, torch.bfloat16, None),
    "deepseek_v3_spare_layer": (tiny_models._deepseek, torch.bfloat16, spare_layer),
    # state spaces
    "mamba2": (_mamba2, torch.float32, None),
    "falcon_mamba": (_falcon_mamba, torch.float32, None),
    "jamba": (_jamba, torch.bfloat16, None),
    # encoders and embedding models
    "bert_old": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), torch.float32, old_layer_norms,
    ),
    "sentence_encoder": (_sentence_encoder, torch.float32, None),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)), torch.float32, None),
    "xlm_roberta_without_prefix": (
        lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**ENCODER)), torch.float16, None,
    ),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=512)
        ),
        torch.float32, None,
    ),
    "electra": (
        lambda: hf.ElectraForTokenClassification(hf.ElectraConfig(**ENCODER, embedding_size=32)),
        torch.float32, None,
    ),
    "albert": (
        lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**ENCODER, embedding_size=32)),
        torch.float32, None,
    ),
    "deberta_v2": (
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**ENCODER)),
        torch.float16, None,
    ),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**{**COMMON, "cls_token_id": 1, "sep_token_id": 2})
        ),
        torch.float32, None,
    ),
    # encoder and decoder
    "bart": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQUENCE)), torch.float32, None,
    ),
    "marian": (
        lambda: hf.MarianMTModel(
            hf.MarianConfig(**{**SEQUENCE, "decoder_start_token_id": 0}, decoder_vocab_size=512)
        ),
        torch.float16, None,
    ),
    "pegasus": (
        lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**SEQUENCE)),
        torch.float32, None,
    ),
    "mt5": (lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), torch.float32, None),
    "umt5": (lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)), torch.bfloat16, None),
    # images
    "clip": (_clip, torch.float32, None),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), torch.float32, None),
    "siglip_vision": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), torch.float16, None,
    ),
    "llava_old": (
        _llava, torch.bfloat16,
        renamed(
            **{
                r"^model\.language_model\.": "language_model.model.",
                r"^lm_head\.": "language_model.lm_head.",
                r"^model\.(vision_tower|multi_modal_projector)": r"\1",
            }
        ),
    ),
    "paligemma": (_paligemma, torch.bfloat16, None),
    "qwen2_vl": (lambda: _qwen_vl("qwen2_vl"), torch.bfloat16, None),
    "qwen2_5_vl": (lambda: _qwen_vl("qwen2_5_vl"), torch.bfloat16, None),
    # sound
    "wav2vec2_old": (
        lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**AUDIO)), torch.float32, old_weight_norm,
    ),
    "hubert_old": (
        lambda: hf.HubertForCTC(hf.HubertConfig(**AUDIO)), torch.float16, old_weight_norm,
    ),
}  # fmt: skip
"""Name -> what builds the model, the dtype of its file, and how its file differs from today's."""


def make(name: str, folder: Path) -> Path:
    """Saves the architecture `name` into a folder, under published names; returns the folder."""
    if name in tiny_models.MAKERS:
        return tiny_models.MAKERS[name](folder)
    build, dtype, change = LAYOUTS[name]
    torch.manual_seed(0)
    tiny_models.save(folder, build(), dtype=dtype)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        copies = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


NAMES = sorted({*LAYOUTS, *tiny_models.MAKERS})


def output_of(model: Any) -> torch.Tensor:
    """Returns the first output of a model of any of these architectures, on fixed inputs."""
    kind, dtype = model.config.model_type, model.dtype
    ids = torch.arange(3, 23).reshape(2, 10)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).to(dtype)
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind == "whisper":
        features = torch.linspace(-1, 1, 16 * 64).reshape(1, 16, 64).to(dtype)
        inputs = {"input_features": features, "decoder_input_ids": ids[:1, :4]}
    elif kind in ("wav2vec2", "hubert"):
        inputs = {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400).to(dtype)}
    elif kind in ("vit", "siglip_vision_model"):
        inputs = {"pixel_values": pixels}
    elif kind == "clip":
        inputs = {"input_ids": ids, "pixel_values": pixels}
    elif kind in ("llava", "paligemma"):
        ids[:, 2:6] = 511
        inputs = {"input_ids": ids, "pixel_values": pixels}
    elif kind in ("qwen2_vl", "qwen2_5_vl"):
        ids[0, 2:6] = torch.tensor([502, 500, 500, 500])
        ids[0, 6] = 500
        grid = torch.tensor([[1, 4, 4]])
        patches = torch.linspace(-1, 1, 16 * 3 * 2 * 16).reshape(16, -1).to(dtype)
        types = (ids == 500).int()
        inputs = {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": types,
        }
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.inference_mode():
        output = model(**inputs)
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, torch.Tensor))
