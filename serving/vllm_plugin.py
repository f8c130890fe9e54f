"""The entry point that vLLM calls once in each of its processes (group `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Makes `quant_method: codecllm` and `--load-format codecllm` known to vLLM.

    Calling it again changes nothing. It imports neither codecllm.loader nor transformers' models:
    the process that serves requests needs neither.
    """
    from codecllm.serving import vllm_names
    from codecllm.serving.vllm_config import CodecLLMConfig
    from codecllm.serving.vllm_loader import CodecLLMLoader

    vllm_names.register(CodecLLMConfig, CodecLLMLoader)
