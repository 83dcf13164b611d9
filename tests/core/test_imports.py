"""Who may import whom: the layers of the house, checked in the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder -> our packages that it may import.
CORE = {"kvjax.core"}
CODECS = CORE | {"kvjax.codecs", "pallas_kernels"}
CACHE = CODECS | {"kvjax.attention", "kvjax.policies", "kvjax.cache"}
METHODS = CODECS | {"kvjax.attention", "kvjax.methods"}
MODELS = CORE | {"kvjax.models"}
CALIBRATE = METHODS | MODELS | {"kvjax.calibrate"}
GENERATE = CACHE | MODELS | {"kvjax.parallel", "kvjax.generate"}
CHECKPOINT = CACHE | MODELS | {"kvjax.parallel", "kvjax.checkpoint"}
TRAIN = GENERATE | METHODS | {"kvjax.checkpoint", "kvjax.train"}
SELECT = GENERATE | {"kvjax.checkpoint", "kvjax.select"}
EPISODES = GENERATE | {"kvjax.policies", "kvjax.episodes", "kvjax.checkpoint"}
EVALS = SELECT | EPISODES | CALIBRATE | TRAIN | {"kvjax.evals", "kvjax"}
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "kvjax/core": CORE,
    "kvjax/codecs": CODECS,
    "kvjax/policies": CORE | {"kvjax.attention", "kvjax.policies"},
    "kvjax/attention": CODECS | {"kvjax.attention"},
    "kvjax/cache": CACHE,
    "kvjax/methods": METHODS,
    "kvjax/models": MODELS,
    "kvjax/search": CODECS | {"kvjax.search"},
    "kvjax/calibrate": CALIBRATE,
    "kvjax/parallel": CACHE | MODELS | {"kvjax.parallel"},
    "kvjax/checkpoint": CHECKPOINT,
    "kvjax/generate": GENERATE | {"kvjax.checkpoint"},
    "kvjax/train": TRAIN,
    "kvjax/select": SELECT,
    "kvjax/episodes": EPISODES,
    "kvjax/evals": EVALS,
    "kvjax/cli": EVALS | {"kvjax.cli"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {n for n in names if n.split(".")[0] in ("kvjax", "pallas_kernels", "experiments")}


def package(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "kvjax":
        return parts[0]
    folder = ROOT / "kvjax" / (parts[1] if len(parts) > 1 else "")
    return ".".join(parts[:2]) if len(parts) > 1 and folder.is_dir() else "kvjax"


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_follow_the_layers(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        # `from kvjax import x` names kvjax itself too: only the part that is a package counts.
        found = {package(name) for name in imported(path)}
        if folder != "kvjax/evals" and folder != "kvjax/cli":
            found.discard("kvjax") if any(f.startswith("kvjax.") for f in found) else None
        assert found <= ALLOWED[folder], (
            f"{path.relative_to(ROOT)} imports {found - ALLOWED[folder]}"
        )


def test_every_folder_has_a_rule():
    folders = {
        f"kvjax/{p.name}" for p in (ROOT / "kvjax").iterdir() if (p / "__init__.py").exists()
    }
    assert folders | {"pallas_kernels"} == set(ALLOWED)
