"""Who may import whom, what costs nothing to import, and which names are public."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import milan
from milan.config import PretrainConfig
from milan.evaluation.config import EvaluationConfig
from pipeline.config import ExtractConfig
from stages.options import field_docs

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for package in ("milan", "pipeline", "stages")
    for path in sorted((ROOT / package).rglob("*.py"))
}
HEAVY = {"torch", "torchvision", "ray", "open_clip", "timm", "pyarrow", "zarr", "tensorstore"}
HEAVY |= {"matplotlib", "tensorboard"}

# package -> what it may never import, wherever in a file the import stands
FORBIDDEN = {
    "milan": {"ray", "open_clip", "typer", "dvc", "zarr", "pipeline", "stages"},
    "pipeline": {"typer", "stages"},
    "stages": set(),
}
# room -> the rooms it may import; the modules beside the rooms are rooms of their own
MILAN = {
    "errors": "",
    "version": "",
    "core": "errors",
    "config": "errors core",
    "images": "errors core",
    "store": "errors core images",
    "data": "errors core images store",
    "models": "errors core",
    "objectives": "errors core config images store data models",
    "evaluation": "errors core images models",
    "reporting": "errors core images store data models evaluation",
    "inference": "errors core images store data models evaluation reporting",
    "training": "errors core config images store data models objectives evaluation reporting",
    "reports": "errors version core images store data models objectives evaluation reporting "
    "training",
    "exchange": "errors core store models evaluation reporting training",
    "__main__": "core",
}
# Modules of other packages that milan names by a string, where it loads them when they are needed.
NAMED = {
    "milan/__init__.py": {
        "pipeline.config",
        "pipeline.embed",
        "pipeline.extract",
        "pipeline.repair",
        "pipeline.verify",
        "pipeline.zero_shot",
    },
    "milan/__main__.py": {"stages.cli"},
    "milan/evaluation/protocols.py": {"pipeline.zero_shot"},
    "milan/core/progress.py": {"stages.console"},
    "milan/objectives/rils.py": {"pipeline.teachers.clip"},
    "milan/training/pretrain.py": {"pipeline.cluster.pretrain"},
}
PIPELINE = {
    "config": "",
    "teachers": "",
    "writing": "",
    "cluster": "",
    "extraction": "config teachers writing cluster",
    "estimate": "config teachers writing cluster extraction",
    "embed": "teachers writing",
    "own_words": "teachers",
    "zero_shot": "teachers own_words",
    "verify": "config teachers writing cluster extraction estimate",
    "extract": "config teachers writing cluster extraction estimate",
    "copy_store": "writing",
    "doctor": "config teachers writing cluster extraction estimate",
    "prune": "writing",
    "repair": "config teachers writing cluster extraction estimate verify",
}
ROOMS = {"milan": MILAN, "pipeline": PIPELINE}
# library -> the files that may import it
ONLY = {
    "open_clip": {"pipeline/teachers/clip.py"},
    "ray": {f"pipeline/cluster/{name}.py" for name in ("connect", "pool", "ranks")},
    "zarr": {"pipeline/writing/shards.py"},
    "tensorstore": {"milan/store/generation.py"},
}


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of every import in a file, those inside functions included.

    Modules named by a string (import_module, __import__) count, or the rule would be easily evaded.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value.split(".")[0])
    return found


def at_run_time(tree: ast.Module) -> ast.Module:
    """A file without what only a type checker sees: the blocks below `if TYPE_CHECKING`."""
    seen = [
        n
        for n in tree.body
        if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    ]
    return ast.Module(seen, [])


def modules_imported(tree: ast.Module, package: str) -> set[str]:
    """Modules of `package` that a file imports, by dotted name; those for annotations too."""
    known = {file.removesuffix(".py").replace("/", ".") for file in FILES}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == package}
    return found


def room_of(module: str) -> str:
    """The room of a module by its dotted name: milan.data.order is in data."""
    return module.split(".")[1] if "." in module else ""


def prints(tree: ast.Module) -> list[int]:
    """Lines that write to the terminal: print(…), sys.stdout, sys.stderr."""
    lines = []
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        stream = (
            isinstance(node, ast.Attribute)
            and node.attr in ("stdout", "stderr")
            and getattr(node.value, "id", "") == "sys"
        )
        if called or stream:
            lines.append(node.lineno)
    return lines


def test_every_package_is_looked_at() -> None:
    """A moved folder would make every other test here pass on nothing."""
    assert {name.split("/")[0] for name in FILES} == set(FORBIDDEN)
    assert len(FILES) > 25
    for only in ONLY.values():
        assert only <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file: str) -> None:
    """Else pretraining could run the teacher, and help would start Ray."""
    # The public names have types, those of the pipeline too; no other file of milan knows these.
    public = file == "milan/__init__.py"
    names = imported(at_run_time(FILES[file]) if public else FILES[file])
    assert not names & FORBIDDEN[file.split("/")[0]]
    for library, allowed in ONLY.items():
        assert library not in names or file in allowed, f"{library} belongs in {allowed}"


@pytest.mark.parametrize("file", [f for f in FILES if f.split("/")[0] in ROOMS])
def test_rooms_import_one_way(file: str) -> None:
    """A room imports itself and those below it, never one above: no circle between rooms."""
    package, module = file.split("/")[0], file.removesuffix(".py").replace("/", ".")
    if module == "milan.__init__":
        return  # public names, loaded on first use from wherever they are
    if module.endswith(".__init__"):
        assert len(FILES[file].body) == 1, "an __init__ holds its docstring and nothing else"
        return
    room, rule = room_of(module), ROOMS[package]
    allowed = {room, *rule[room].split()}
    for name in modules_imported(FILES[file], package):
        assert not room_of(name) or room_of(name) in allowed, f"{file} imports {name}"


def test_the_rooms_are_a_hierarchy() -> None:
    """Each room is listed after those that it may import; every folder is a room."""
    for package, rule in ROOMS.items():
        seen: set[str] = set()
        for room, below in rule.items():
            assert set(below.split()) <= seen
            seen.add(room)
        modules = {room_of(f.removesuffix(".py").replace("/", ".")) for f in FILES
                   if f.startswith(package + "/")}  # fmt: skip
        assert modules - {"__init__"} == seen


@pytest.mark.parametrize("package", ["milan", "pipeline", "stages"])
def test_no_file_imports_itself_in_a_circle(package: str) -> None:
    """A circle of files cannot be read, tested or moved one at a time."""
    left = {
        file.removesuffix(".py").replace("/", "."): modules_imported(tree, package)
        for file, tree in FILES.items()
        if file.startswith(package + "/") and file != "milan/__init__.py"
    }
    while left:
        free = [name for name, needs in left.items() if not (needs - {name}) & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_milan_names_the_others_in_six_places() -> None:
    """The pipeline's functions, the command, the default progress, ranks on a cluster, open_clip's
    text towers, and a protocol that loads a teacher; no more."""
    modules = {file.removesuffix(".py").replace("/", ".") for file in FILES}
    found: dict[str, set[str]] = {}
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if file.startswith("milan/") and isinstance(node, ast.Constant):
                name = str(node.value).partition(":")[0]
                if name in modules and not name.startswith("milan"):
                    found.setdefault(file, set()).add(name)
    assert {file: names - {"pipeline", "stages"} for file, names in found.items()} == NAMED


def test_each_fenced_library_is_used_where_it_may_be() -> None:
    """A rule about a library that nobody imports any more would test nothing."""
    for library, allowed in ONLY.items():
        for file in allowed:
            assert library in imported(FILES[file])


def test_only_stages_use_typer_and_speak() -> None:
    """A library that prints cannot be used in someone's own program."""
    for file, tree in FILES.items():
        if not file.startswith("stages/"):
            assert not imported(tree) & {"typer", "rich"}, file
            assert not prints(tree), f"{file}, lines {prints(tree)}"


def test_the_rules_can_see() -> None:
    """The walkers find imports inside functions, named by text, and prints."""
    tree = ast.parse(
        "def f():\n    import ray.util\n    from zarr.storage import x\n    print(1)\n"
        "    sys.stderr.write('')\n    importlib.import_module('open_clip.model')\n"
    )
    assert imported(tree) == {"ray", "zarr", "open_clip"}
    assert prints(tree) == [4, 5]


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file: str) -> None:
    """The first line of a file is its purpose; every public function and class has one too."""
    tree = FILES[file]
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) <= 4
            assert short or ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def test_readme_has_a_line_for_each_room() -> None:
    """And none for a room that is gone."""
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("<pre>") : readme.index("</pre>")]
    rooms, top = set[str](), ""
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        top = top if indent else name
        rooms.add(f"{top}/{name}" if indent else name)
    packages = {Path(file).parent.as_posix() for file in FILES}
    assert packages | {"milan/recipes"} == {r for r in rooms if r.split("/")[0] in FORBIDDEN}
    assert all((ROOT / room).is_dir() for room in rooms)


def test_public_names() -> None:
    """Names are loaded on first use: a typing error in the table would show only there."""
    assert len(set(milan.__all__)) == len(milan.__all__)
    for name in milan.__all__:
        assert getattr(milan, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        milan.no_such_name  # noqa: B018


def loaded_by(code: str) -> set[str]:
    """Heavy modules in a fresh interpreter after `code`."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


RUN = """
import sys
from stages.cli import app
sys.argv = ["milan", *{arguments!r}]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import milan, stages.cli",
        "import milan.config, milan.evaluation.protocols, pipeline.config",
        RUN.format(arguments=["--help"]),
        RUN.format(arguments=["extract-targets", "--help"]),
        RUN.format(arguments=["pretrain", "--help"]),
        RUN.format(arguments=["--version"]),
    ],
    ids=["import", "settings", "help", "extract-targets", "pretrain", "version"],
)
def test_help_is_light(code: str) -> None:
    """Help that imports torch takes seconds."""
    assert loaded_by(code) == set()


def test_lightness_is_seen() -> None:
    """The check above can fail: a module that needs pyarrow shows."""
    assert "pyarrow" in loaded_by("import milan.images.manifest")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.stem)
def test_no_test_imports_another(path: Path) -> None:
    """What tests share is in tests/helpers.py, fixtures in tests/conftest.py."""
    names = imported(ast.parse(path.read_text()))
    assert not {name for name in names if name.startswith(("test_", "conftest"))}


@pytest.mark.parametrize("config", [ExtractConfig, PretrainConfig, EvaluationConfig])
def test_every_setting_is_explained(config: type) -> None:
    """Flags take their help from the line below the field; a field without one has no help."""
    fields = config.__dataclass_fields__  # type: ignore[attr-defined]
    docs = field_docs(config)
    assert set(docs) == set(fields)
    assert all(len(text) > 5 for text in docs.values())
