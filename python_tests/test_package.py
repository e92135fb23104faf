"""The installed package: what the libraries hold, what an import needs, and that every op is complete."""

import importlib.metadata
import importlib.resources
import inspect
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, assert_ran, run_python

import effops
from effops import _C, _load, ops, reference
from effops.testing import OP_DB

LIBRARIES = sorted(_load.library_dir.glob("*.so"))
OP_LIBRARIES = [library for library in LIBRARIES if library.name.startswith("libeffops_")]
ISA_VARIANTS = effops.build_info()["isa_variants"].split()
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
each_op_library = pytest.mark.parametrize("library", OP_LIBRARIES, ids=lambda path: path.stem)
each_op = pytest.mark.parametrize("name", ops.__all__)


def tool(name, *arguments):
    """What a binary utility prints."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------ libraries


def test_libraries_are_installed():
    names = {library.name for library in LIBRARIES}
    assert Path(_C.__file__).name in names
    assert "libeffops_cpu.so" in names
    assert ("libeffops_cuda.so" in names) == bool(effops.build_info()["cuda_compiler"])


@each_op_library
def test_only_the_stable_abi_is_used(library):
    """C functions of libtorch, but nothing of c10::, at:: or torch:: whose ABI changes, and no Python."""
    undefined = tool("nm", "-D", "--undefined-only", "--demangle", library).splitlines()
    symbols = [line.split(maxsplit=1)[1] for line in undefined if line.strip()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "the list looks wrong"
    unstable = re.compile(r"\b(c10|at|caffe2|torch)::|^_?Py[A-Z_]")
    assert [symbol for symbol in symbols if unstable.search(symbol)] == []


@each_op_library
def test_only_our_functions_are_exported(library):
    """Inline functions of torch or the standard library would replace others, or be replaced by them."""
    defined = [line.split()[-2:] for line in tool("nm", "-D", "--defined-only", library).splitlines()]
    functions = {name.split("@")[0] for kind, name in defined if kind in "TWi"}
    ours = {"effops_cpu_capability"} if library.name == "libeffops_cpu.so" else set()
    assert functions - {"_init", "_fini"} == ours


@each_library
def test_no_run_path(library):
    assert not re.search(r"\((RPATH|RUNPATH)\)", tool("readelf", "-d", library))


@each_op_library
def test_libtorch_is_linked(library):
    """Otherwise a symbol that libtorch lacks is noticed only when it is called."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", library))
    assert any(name.startswith("libtorch") for name in needed)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizers keep file names")
@each_library
def test_no_path_of_the_building_machine(library):
    data = library.read_bytes()
    folders = {
        str(REPOSITORY),
        sysconfig.get_path("purelib"),
        str(Path(torch.__file__).parent),
        str(Path.home()),
    }
    assert [folder for folder in folders if len(folder) > 1 and folder.encode() in data] == []
    assert re.findall(rb"(?<![\w.])/(?:home|root|Users|tmp|work|build)/[\w./+-]+", data) == []


# ------------------------------------------------------------------------------------ instruction sets


def isa_objects():
    """Objects of the kernel files in the build folder of this interpreter, optimised builds only.

    A build with sanitizers or at -O1 keeps inline functions as weak symbols; it is never shipped.
    """
    tag = f"cp{sysconfig.get_config_var('py_version_nodot')}-"
    found = []
    for folder in (REPOSITORY / ".build").glob(f"*-{tag}*"):
        cache = folder / "CMakeCache.txt"
        text = cache.read_text() if cache.exists() else ""
        if "EFFOPS_SANITIZE:BOOL=OFF" in text and "CMAKE_BUILD_TYPE:STRING=Release" in text:
            variants = "|".join(ISA_VARIANTS)
            found += [path for path in folder.rglob("*.o") if re.search(rf"_({variants})\.dir/", str(path))]
    return sorted(found)


def test_isa_objects_share_no_function():
    """The linker keeps one copy of a weak function, maybe the AVX-512 one, which then runs everywhere.

    Looked for in the objects, since the linked library no longer tells who brought a function. What a
    kernel file defines globally lies in the namespace of its instruction set.
    """
    objects = isa_objects()
    if not objects:
        pytest.skip("no build folder of this interpreter: installed from a wheel")
    assert {name for name in ISA_VARIANTS if any(f"_{name}.dir" in str(path) for path in objects)} == set(
        ISA_VARIANTS
    )
    for path in objects:
        (variant,) = re.findall(r"_(\w+)\.dir/", str(path))[-1:]
        variant = next(name for name in ISA_VARIANTS if variant.endswith(name))
        for line in tool("nm", "--defined-only", path).splitlines():
            kind, name = line.split()[-2:]
            assert kind not in "WVuvw", f"{path.name} for {variant} shares {name} with other objects"
            assert kind in "tdbrn" or f"isa_{variant}" in name, f"{path.name} for {variant} exports {name}"


def kernel_files():
    return sorted((REPOSITORY / "csrc").rglob("*_cpu_kernel.cpp"))


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.stem)
def test_kernel_files_include_no_torch_and_no_containers(path):
    """Their inline functions would be compiled once per instruction set."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-DEFFOPS_ISA=isa_default", "-M", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    headers = listed.replace("\\\n", " ").split()[1:]
    assert any(header.endswith("host_device.h") or "csrc" in header for header in headers)
    banned = {"vector", "string", "algorithm", "memory", "map", "functional", "iostream", "sstream", "array"}
    assert [header for header in headers if "/torch/" in header or Path(header).name in banned] == []


# ------------------------------------------------------------------------------------ package


def test_versions_agree():
    assert effops.__version__ == effops.build_info()["version"] == importlib.metadata.version("effops")


def test_build_info():
    info = effops.build_info()
    assert info["torch_target"] == "2.10"
    assert all(isinstance(value, str) for value in info.values())
    assert effops.cpu_capability() in info["isa_variants"].split()


def test_types_are_shipped():
    assert importlib.resources.files("effops").joinpath("py.typed").is_file()


IMPORT_ALONE = """
import sys
BLOCKED = ("numpy", "rich", "typer", "matplotlib", "skimage", "sklearn", "scipy", "cv2", "faiss")
BLOCKED += ("hypothesis", "pytest")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about NumPy
    import torch
import effops
assert not {"effops.testing", "effops.demo", "effops.models", "effops.cli"} & set(sys.modules)
from effops.testing import OP_DB, check_forward
for info in OP_DB:
    check_forward(info, info.build_sample(info.typical))
assert not set(BLOCKED) & {name for name in sys.modules if sys.modules[name] is not None}
"""


def test_import_needs_torch_alone():
    assert_ran(run_python(IMPORT_ALONE))


def test_message_without_the_compiled_module():
    process = run_python("import sys; sys.modules['effops._C'] = None; import effops")
    assert process.returncode == 1
    assert "ImportError: effops: the compiled module effops._C is missing" in process.stderr
    assert "pip install --no-build-isolation -e ." in process.stderr


# ------------------------------------------------------------------------------------ every op is complete


def entry(name):
    (found,) = [info for info in OP_DB if info.name == name]
    return found


def test_names_agree():
    """An op that is public is in the database, and has a definition, and the other way round."""
    assert sorted(ops.__all__) == sorted(info.name for info in OP_DB)
    assert set(ops.__all__) <= set(reference.__all__)
    assert set(ops.__all__) <= set(effops.__all__)


@each_op
def test_docstring(name):
    text = inspect.getdoc(getattr(ops, name))
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"no section {section}"
    arguments = text.split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(getattr(ops, name)).parameters:
        assert re.search(rf"^ +(\w+, )*{parameter}(, \w+)*:", arguments, re.MULTILINE), (
            f"{parameter} is not explained"
        )


@each_op
def test_exports(name):
    assert getattr(effops, name) is getattr(ops, name)
    assert hasattr(torch.ops.effops, name)


@each_op
def test_reference_has_the_same_signature(name):
    def form(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert form(getattr(ops, name)) == form(getattr(reference, name))


@each_op
def test_annotations(name):
    """Every parameter and the result have a type."""
    signature = inspect.signature(getattr(ops, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


@each_op
def test_entry_is_complete(name):
    info = entry(name)
    kinds = set(info.sample_kinds.values())
    assert {"ordinary", "awkward", "empty", "strided"} <= kinds
    assert len(info.sample_kinds) >= 20
    ordinary = [sample for sample in info.samples() if sample.kind == "ordinary"]
    assert len(ordinary) >= 2
    names = set(inspect.signature(info.op).parameters)
    mentioned = {*info.differentiable, *info.linear_in, *info.coordinates, *info.autocast, *info.vmap_batched}
    arguments = {re.split(r"[\[.]", label)[0] for label in {*mentioned, *info.dynamic, *info.vmap_shared}}
    assert arguments <= names
    assert info.keeps_channels_last in {"", *names}
    for sizes in (info.typical, info.smallest, *info.large, *info.other_paths):
        assert set(sizes) == set(info.size_ranges)


@each_op
def test_schema_rules(name):
    """No str and no nested lists (AOTInductor and old exported programs), tensors positional."""
    for op in (name, f"{name}_backward"):
        if not hasattr(torch.ops.effops, op):
            continue
        for argument in getattr(torch.ops.effops, op).default._schema.arguments:
            assert "str" not in str(argument.type)
            assert "List[List" not in str(argument.type)
            assert not argument.kwarg_only
            assert argument.alias_info is None, "ops neither write to nor return their inputs"
