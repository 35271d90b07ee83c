"""Builds stepquant._C, the compiled operations. Without a working compiler the package installs and runs in plain torch."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Files whose code runs only where the processor was asked for these instructions first.
INSTRUCTIONS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
COMMON = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-DNDEBUG", "-g0"]
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]


def extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [source for source in sources if Path(source).stem not in INSTRUCTIONS]
    return Extension(
        "stepquant._C",
        sources,
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch"],
        extra_compile_args=[*COMMON, *QUIET, *os.environ.get("STEPQUANT_CXXFLAGS", "").split()],
        extra_link_args=["-fopenmp", *os.environ.get("STEPQUANT_LDFLAGS", "").split()],
        language="c++",
        optional=True,
    )


class BuildOperations(build_ext):
    """Compiles each file with its own instruction set, as many at once as there are processors."""

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_each(
            sources: list[str], extra_postargs: list[str] | None = None, **options: object
        ) -> list[str]:
            def compile_one(source: str) -> list[str]:
                flags = [*(extra_postargs or []), *INSTRUCTIONS.get(Path(source).stem, [])]
                return compile_all([source], extra_postargs=flags, **options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for objects in pool.map(compile_one, sources) for made in objects]

        self.compiler.compile = compile_each
        super().build_extension(ext)


def extensions() -> list[Extension]:
    try:
        return [extension()]
    except ImportError:
        print("warning: torch is not installed in the build environment: stepquant._C is left out")
        return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOperations})
