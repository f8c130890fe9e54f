"""The process that `engine.Engine` starts: vLLM, and models that are loaded one after another.

It reads one job a line (JSON) from standard input and writes one answer a line to the descriptor
that its argument names. All else that vLLM prints goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any


def main() -> None:
    """Answers jobs until the input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    model = None
    try:
        model = LLM(**job["options"])
        answer = {"outputs": _generate(model, job), "hash": _hash(model), **_memory(model)}
    except Exception as exc:
        answer = {"error": type(exc).__name__, "message": str(exc)}
    del model
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


def _generate(model: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    wanted = SamplingParams(
        temperature=0, max_tokens=job["tokens"], prompt_logprobs=3, ignore_eos=True
    )
    prompts = [_with_image(prompt) for prompt in job["prompts"]]
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    outputs = model.generate(prompts, wanted, use_tqdm=False, lora_request=adapter)
    return [
        {
            "text": output.outputs[0].text,
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in place.items()}
                for place in output.prompt_logprobs[1:]
            ],
        }
        for output in outputs
    ]


def _with_image(prompt: Any) -> Any:
    """Returns a prompt with a made picture of `image_size` pixels a side, where it names one."""
    if "image_size" not in prompt:
        return prompt
    import numpy as np
    from PIL import Image

    size = prompt["image_size"]
    pixels = (np.arange(size * size * 3) % 251).astype(np.uint8).reshape(size, size, 3)
    data = {"image": Image.fromarray(pixels)}
    return {"prompt": prompt["prompt"], "multi_modal_data": data}


def _hash(model: Any) -> str:
    """Returns the key of vLLM's compile cache."""
    return str(model.llm_engine.vllm_config.compute_hash())


def _memory(model: Any) -> dict[str, Any]:
    """Returns the dtypes of the parameters, where they are in this process."""
    try:
        dtypes = model.apply_model(_dtypes)[0]
    except Exception:
        return {}
    return {"dtypes": dtypes}


def _dtypes(model: Any) -> dict[str, str]:
    return {name: str(value.dtype) for name, value in model.named_parameters()}


if __name__ == "__main__":
    main()
