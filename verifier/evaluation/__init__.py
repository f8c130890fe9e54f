"""Distance of converted models from their base: divergence, agreement and perplexity on a text."""

from codecllm.verifier.evaluation.evaluate import Evaluation, Score, evaluate, sample_text

__all__ = ["Evaluation", "Score", "evaluate", "sample_text"]
