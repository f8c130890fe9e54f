"""The kernels as a real device's compiler makes them, to which a number such as that of a single column is a constant."""

from __future__ import annotations

from tests.loader.test_weight_kernels import (
    test_codes_are_dequantized_from_any_tiles,
    test_column_scales_orders_and_wide_codes,
    test_elements_are_assembled_from_any_tiles,
    test_every_code_times_scales_of_every_size,
)

__all__ = [
    "test_codes_are_dequantized_from_any_tiles",
    "test_column_scales_orders_and_wide_codes",
    "test_elements_are_assembled_from_any_tiles",
    "test_every_code_times_scales_of_every_size",
]
