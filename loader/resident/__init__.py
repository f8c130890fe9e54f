"""Weights that stay quantized or entropy-coded in memory.

`form.WeightForm` is the contract of each.
"""

# A coded weight that is unpickled needs its operations, whatever else was imported.
from codecllm.loader.resident import operations as operations
