"""The fixed prompts of the baseline: short and long, several scripts, code, numbers.

Changing one is a new baseline version.
"""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Hauptstadt von Österreich ist",
    "東京は日本の",
    "Q: Why does ice float on water?\nA:",
    "In 1905 Albert Einstein published four papers that changed physics. The first explained the "
    "photoelectric effect by light that comes in quanta, the second the jitter of small particles "
    "in a liquid by the impacts of molecules, the third joined space and time into one, and the "
    "fourth derived from it that mass and energy are",
)
NEW_TOKENS = 32
TOP_TOKENS = 16
HIDDEN_SAMPLES = 32
