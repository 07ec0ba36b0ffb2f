"""Builds the compiled loops; all else about the package stands in pyproject.toml.

They are a module beside the package, so that a checkout finds what was installed.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "_mergekit_metagpt",
            ["mergekit_metagpt/arithmetic/loops.c"],
            # Sums are formed operation by operation: the same bits everywhere.
            extra_compile_args=["-O3", "-g0", "-ffp-contract=off"],
            py_limited_api=True,
            # Where there is no compiler, torch does the work, slower.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
