"""Builds the native module with ninja; everything else is in pyproject.toml.

ATTRFAST_NATIVE=0 skips the native module. ATTRFAST_CUDA=0|1|auto decides about the CUDA sources: `auto`
(the default) builds them where nvcc is found, 1 insists. What was decided, and why something is missing,
is written into the package and printed by `python -m attrfast.env`. ATTRFAST_SANITIZE=1 builds the CPU sources
with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = Extension("attrfast._native", sources=[])
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]  # GCC 10 and newer know it
# Later flags win, so this is -O1. The first finding ends the process.
SANITIZE_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-fno-omit-frame-pointer", "-g1", "-O1"),
]
# A GPU runs the machine code of its own generation; newer ones compile what the last one is made from.
GPUS = ("80", "90")


def wanted() -> bool:
    return os.environ.get("ATTRFAST_NATIVE", "1").strip() != "0"


def sanitized() -> bool:
    return os.environ.get("ATTRFAST_SANITIZE", "0").strip() == "1"


def cuda_decision() -> str:
    """What becomes of the CUDA sources, in words; raises where they were insisted on in vain."""
    choice = os.environ.get("ATTRFAST_CUDA", "auto").strip().lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"ATTRFAST_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return "not built: ATTRFAST_CUDA=0"
    if not list((ROOT / "csrc").glob("cuda/*.cu")):
        reason = "this version of attrfast has no CUDA sources"
    elif shutil.which("nvcc") is None:
        reason = "nvcc was not found"
    else:
        return "built"
    return cuda_missing(reason)


def cuda_missing(reason: str) -> str:
    """The same where the CUDA sources can't be built."""
    if os.environ.get("ATTRFAST_CUDA", "auto").strip() == "1":
        raise SystemExit(f"ATTRFAST_CUDA=1, but {reason}")
    return f"not built: {reason}"


def gpu_flags() -> list[str]:
    """nvcc's flags for those of GPUS that it knows; RuntimeError if there are none."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True)
    known = [gpu for gpu in GPUS if f"sm_{gpu}" in listed.stdout.split()]
    if not known:
        raise RuntimeError(f"nvcc compiles for none of the GPU generations {', '.join(GPUS)}")
    flags = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def flags_for(isa: str, compiler: str) -> list[str]:
    """What compiles the kernels of an instruction set; nothing where the compiler does not know it."""
    flags = ISA_FLAGS.get(isa, []) if X86 else []
    tried = [*compiler.split(), *flags, "-E", "-x", "c++", os.devnull]
    return flags if subprocess.run(tried, capture_output=True).returncode == 0 else []


def escaped(path: object) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    """Compiles every source in parallel; a failure leaves attrfast without the native module."""

    def build_extension(self, ext: Extension) -> None:
        record = {"native": "built", "cuda": cuda_decision(), "compiler": ""}
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if record["cuda"] == "built":
                try:
                    record["compiler"] = self.compile(target, cuda=True)
                except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                    # Where the compiler is at fault, the next attempt says so.
                    record["cuda"] = cuda_missing(str(error))
            if record["cuda"] != "built":
                record["compiler"] = self.compile(target, cuda=False)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            record["native"] = f"not built: {error}"
            target.unlink(missing_ok=True)  # of an earlier build
            print(
                f"attrfast: the native module was not built ({error}). attrfast works without it, "
                f"on slower PyTorch operations.",
                file=sys.stderr,
            )
            record["cuda"] = "not built: the native module was not built"
        write_record(target.parent, record)

    def compile(self, target: Path, cuda: bool) -> str:
        import pybind11

        compiler = os.environ.get("CXX") or next(
            (c for c in ("g++", "clang++", "c++") if shutil.which(c)), ""
        )
        if not compiler or shutil.which(compiler.split()[0]) is None:
            raise RuntimeError(f"no C++ compiler was found{f' ({compiler})' if compiler else ''}")
        version = subprocess.run(
            [*compiler.split(), "--version"], check=True, capture_output=True, text=True
        ).stdout.splitlines()[0]
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        quoted = version.replace('"', "").replace("'", "")
        lines = [
            "ninja_required_version = 1.3",
            f"cxx = {compiler}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {self.linker(compiler, cuda)} $in -o $out",
            "rule compile_cuda",
            "  command = nvcc -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
            flags = [*FLAGS, *flags_for(source.stem, compiler)]
            flags += SANITIZE_FLAGS if sanitized() else []
            if source.stem == "bindings":
                flags += [*includes, f"'-DATTRFAST_COMPILER=\"{quoted}\"'"]
                flags += ["-DATTRFAST_WITH_CUDA"] if cuda else []
            objects.append(folder / f"{source.stem}.o")
            lines += [
                f"build {escaped(objects[-1])}: compile {escaped(source)}",
                "  flags = " + " ".join(flags).replace("$", "$$"),
            ]
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if cuda else []:
            flags = ["-O3", "-std=c++17", *gpu_flags(), "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            objects.append(folder / f"{source.stem}.cu.o")
            lines += [
                f"build {escaped(objects[-1])}: compile_cuda {escaped(source)}",
                "  flags = " + " ".join(flags),
            ]
        lines.append(f"build {escaped(target)}: link {' '.join(map(escaped, objects))}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        result = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True
        )
        if result.returncode:
            print(result.stdout[-4000:], result.stderr[-4000:], file=sys.stderr)
            failed = "the build with nvcc" if cuda else compiler
            raise RuntimeError(f"{failed} failed; its messages stand above")
        return version

    @staticmethod
    def linker(compiler: str, cuda: bool) -> str:
        """The command that links the module. nvcc knows where its runtime lies; linked statically and kept
        from view, that meets no other copy, and needs no driver to be loaded."""
        if not cuda:
            return " ".join(["$cxx -shared -fopenmp", *(SANITIZE_FLAGS if sanitized() else [])])
        # The same compiler as for the other sources, which decides the OpenMP library.
        host = f"-ccbin={compiler} " if len(compiler.split()) == 1 else ""
        hidden = "-Xlinker=--exclude-libs=libcudart_static.a"
        return f"nvcc {host}-shared -cudart=static -Xcompiler=-fopenmp,-fPIC {hidden}"

    def get_outputs(self) -> list[str]:
        # setuptools expects what a failed build did not make.
        made = [path for path in super().get_outputs() if Path(path).exists()]
        record = Path(self.get_ext_fullpath(NATIVE.name)).parent / "_build.json"
        return [*made, *([str(record)] if record.exists() else [])]

    def copy_extensions_to_source(self) -> None:
        # An editable install: the module goes beside the sources, if there is one.
        built = Path(self.get_ext_fullpath(NATIVE.name))
        self.inplace = 0
        made = Path(self.get_ext_fullpath(NATIVE.name))
        self.inplace = 1
        for path in (made, made.parent / "_build.json"):
            if path.exists():
                # Moved into place: a process that has the old module loaded keeps it whole.
                beside = built.parent / f"{path.name}.part"
                shutil.copy2(path, beside)
                os.replace(beside, built.parent / path.name)


class BuildPython(build_py):
    """Notes that no native module was asked for."""

    def run(self) -> None:
        super().run()
        if not wanted():
            record = {"native": "not built: ATTRFAST_NATIVE=0", "cuda": cuda_decision(), "compiler": ""}
            place = ROOT / "attrfast" if self.editable_mode else Path(self.build_lib) / "attrfast"
            for stale in (*place.glob("_native*.so"), *place.glob("_native*.pyd")):
                stale.unlink()
            write_record(place, record)


def write_record(folder: Path, record: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


setup(
    ext_modules=[NATIVE] if wanted() else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
