"""The process that `sglang_engine.start` starts: SGLang's engine for one job, given as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers the job."""
    import sglang

    job = json.loads(sys.argv[1])
    first, *others = job["models"]
    engine = sglang.Engine(model_path=first, **job["options"])
    answers = [_generate(engine, job["prompts"])]
    for model in others:
        _wait_until_idle(engine)
        is_good, message, *_ = engine.update_weights_from_disk(model)
        assert is_good, message
        answers.append(_generate(engine, job["prompts"]))
    Path(job["answers"]).write_text(json.dumps(answers))
    engine.shutdown()


def _wait_until_idle(engine: Any) -> None:
    """Waits until the scheduler has put the last requests away, a minute at most."""
    for _ in range(600):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise TimeoutError("SGLang's scheduler still holds requests")


def _generate(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )
    return [
        {
            "ids": output["output_ids"],
            "logprobs": [value for value, *_ in output["meta_info"]["input_token_logprobs"][1:]],
        }
        for output in outputs
    ]


if __name__ == "__main__":
    main()
