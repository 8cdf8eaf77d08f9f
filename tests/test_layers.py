"""The architecture's rule, held by walking the imports: they go down only, and what must be light stays light."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sae_transfer

PACKAGE = Path(sae_transfer.__file__).parent
CHECKOUT = Path(__file__).parent.parent

# From the bottom up. A room is a module or a subpackage; inside a subpackage imports are free, but for the stages.
STOREYS = (
    {"errors", "progress", "throughput", "redaction", "signals"},
    {"config", "demo", "console", "run_log"},
    {"study_file"},
    {"study", "cost"},
    {"tracking"},
    {"models"},
    {"saes"},
    {"analysis", "report"},
    {"stages"},
    {"pipeline"},
    {"sweep", "plan"},
    {"cli"},
    {"__main__"},
)
STAGES = {"cross_eval", "instruct", "outliers", "weights"}
MAY_IMPORT_DEMO = {"cli", "pipeline", "models", "demo"}
NUMERIC = ("torch", "transformers", "sae_lens", "transformer_lens")


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name without the package's, `models.splice`."""
    parsed = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parsed[".".join(parts).removesuffix("__init__").rstrip(".")] = ast.parse(path.read_text(encoding="utf-8"))
    return parsed


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Of these, the package's own modules, without its name in front."""
    for name in imported(tree):
        package, *parts = name.split(".")
        # What the package itself holds, its version, is no room.
        if package == "sae_transfer" and parts and parts[0] in ROOMS:
            yield tuple(parts)


ROOMS = {name: storey for storey, names in enumerate(STOREYS) for name in names}
MODULES = modules()


def test_every_module_has_its_room() -> None:
    assert {name.split(".")[0] for name in MODULES} - set(ROOMS) == {""}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    room = name.split(".")[0]
    for parts in own_imports(MODULES[name]):
        assert room, "the package itself imports none of its rooms, so that any of them can be imported alone"
        assert parts[0] == room or ROOMS[parts[0]] < ROOMS[room], f"{name} imports {'.'.join(parts)}"
        assert parts[0] != "demo" or room in MAY_IMPORT_DEMO, f"{name} imports the demo"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("analysis.")])
def test_stages_meet_through_files_and_never_import_each_other(name: str) -> None:
    neighbours = {parts[1] for parts in own_imports(MODULES[name]) if parts[0] == "analysis"}
    assert not neighbours & STAGES


@pytest.mark.parametrize(("package", "module"), [("wandb", "tracking"), ("submitit", "sweep.slurm")])
def test_what_may_be_absent_or_slow_is_imported_in_one_module(package: str, module: str) -> None:
    users = {name for name, tree in MODULES.items() if any(i.split(".")[0] == package for i in imported(tree))}
    assert users == {module}


def test_the_report_reads_results_only() -> None:
    for name, tree in MODULES.items():
        if name.split(".")[0] == "report":
            assert not {i.split(".")[0] for i in imported(tree)} & set(NUMERIC), name
            assert {parts[0] for parts in own_imports(tree)} <= {"report", "study", "cost", "config", "errors"}, name


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a new interpreter holds after running the code."""
    report = "\nimport sys; sys.stderr.write('\\n' + ' '.join({m.split('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.splitlines()[-1].split())


def test_reports_costs_configs_and_sweeps_work_without_torch() -> None:
    rooms = {"report", "sweep", "study", "study_file", "config", "cost", "errors", "throughput"}
    light = [name for name in MODULES if name.split(".")[0] in rooms]
    loaded = loaded_after("".join(f"import sae_transfer.{name}\n" for name in light))
    assert not loaded & {*NUMERIC, "wandb", "datasets"}


def test_help_imports_nothing_heavy() -> None:
    loaded = loaded_after(
        "import sys\n"
        "sys.argv = ['sae-transfer', '--help']\n"
        "from sae_transfer.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    assert "sae_transfer" in loaded
    assert not loaded & {*NUMERIC, "wandb", "datasets", "pandas", "matplotlib"}


def test_all_that_is_imported_is_declared_and_locked() -> None:
    distributions = packages_distributions()
    tops = {name.split(".")[0] for tree in MODULES.values() for name in imported(tree)}
    outside = tops - set(sys.stdlib_module_names) - {"sae_transfer"}
    needed = {distribution_name(distributions[top][0]) for top in outside}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["slurm"]]
    lock = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert needed <= {distribution_name(line) for line in declared}
    assert needed <= {distribution_name(line) for line in lock}


def distribution_name(requirement: str) -> str:
    """The normalized name in front of a requirement's extras and versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()
