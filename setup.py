"""Builds the native core where a C compiler is; without one the package is complete and slower.

CODECLLM_REQUIRE_NATIVE=1 makes a failure to build it an error: wheels are built so.
"""

import os

from setuptools import Extension, setup

SOURCES = (
    "check",
    "dispatch",
    "kernels_avx2",
    "kernels_avx512",
    "kernels_neon",
    "kernels_portable",
    "module",
    "module_encode",
    "module_pack",
    "module_run",
    "pack",
    "rans",
    "run",
    "xxh3",
)

setup(
    ext_modules=[
        Extension(
            "codecllm._native",
            sources=[f"native/{name}.c" for name in SOURCES],
            depends=["native/core.h", "native/kernels.inc.h", "native/module.h"],
            include_dirs=["native"],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fvisibility=hidden",
            ],
            py_limited_api=True,
            optional=os.environ.get("CODECLLM_REQUIRE_NATIVE") != "1",
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
