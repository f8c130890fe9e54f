"""How far converted models are from their base, at how many bits: divergence, agreement and perplexity on a text."""

from codecllm.verifier.evaluation.evaluate import Evaluation, Score, evaluate, sample_text

__all__ = ["Evaluation", "Score", "evaluate", "sample_text"]
