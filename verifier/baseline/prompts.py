"""The fixed prompts of the baseline: several scripts, prose, code, numbers, a question.

A record holds its own prompts, so old records stay valid when these change. In the tokenizers of
today each has at least `PROMPT_TOKENS` tokens.
"""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "Paris is the capital of France, Rome is the capital of Italy, Madrid is the capital of Spain, "
    "Lisbon is the capital of Portugal, Vienna is the capital of Austria, Athens is the capital of",
    "Once upon a time an old miller lived with his three sons in a small house beside the river. "
    "When he felt that he would soon die, he called the eldest to his bed and told him",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n\n\ndef factorial(n):\n    result = 1\n    for factor in range(2, n + 1):\n",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765,",
    "Die Hauptstadt von Österreich ist Wien, die Hauptstadt der Schweiz ist Bern, und die größte "
    "Stadt Deutschlands ist Berlin. Durch alle drei Länder fließen Flüsse, die in den Alpen",
    "東京は日本の首都であり、世界でも最も人口の多い都市の一つです。"
    "明治時代より前は江戸と呼ばれ、将軍の城を中心に大きな町が広がっていました。現在の東京には",
    "Q: Why does ice float on water, while most other solids sink in the liquid from which they "
    "froze?\nA: Because water expands when it freezes, so that the ice has a lower density than",
    "In 1905 Albert Einstein published four papers that changed physics. The first explained the "
    "photoelectric effect by light that comes in quanta, the second the jitter of small particles",
)
PROMPT_TOKENS = 24
NEW_TOKENS = 32
TOP_TOKENS = 16
HIDDEN_SAMPLES = 32
