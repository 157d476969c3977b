"""Compiles `gradflow/_sums.c` where there is a C compiler; all else is in pyproject.toml, and works without."""

import sys

from setuptools import Extension, setup

FLAGS = {
    "linux": ["-O3", "-fopenmp-simd", "-pthread", "-fno-trapping-math", "-fno-math-errno"],
    "darwin": ["-O3", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-Wno-unknown-pragmas"],
}
LIBRARIES = {"linux": ["-pthread"]}

setup(
    ext_modules=[
        # no use of Python's own interface: one library serves every version, and the compiler needs no headers of it
        Extension(
            "gradflow._sums", ["gradflow/_sums.c", "gradflow/_samples.c", "gradflow/_helpers.c"],
            depends=["gradflow/_helpers.h", "gradflow/_lanes.h", "gradflow/_portable.h"],
            py_limited_api=True, optional=True,
            extra_compile_args=FLAGS.get(sys.platform, []), extra_link_args=LIBRARIES.get(sys.platform, []),
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
