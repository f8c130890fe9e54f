"""Distance of converted models from their base.

Divergence, agreement and perplexity on a text; accuracy and agreement on tasks with answers.
"""

from codecllm.verifier.evaluation.evaluate import Evaluation, Score, evaluate, sample_text
from codecllm.verifier.evaluation.tasks import TaskEvaluation, TaskScore, evaluate_tasks

__all__ = [
    "Evaluation",
    "Score",
    "TaskEvaluation",
    "TaskScore",
    "evaluate",
    "evaluate_tasks",
    "sample_text",
]
