"""Imports go one way: axes languages run <- data model <- train evaluate export <- talk."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "tiny_aya_jax"
FLOOR = {
    "axes": 0, "client": 0, "languages": 0, "run": 0, "processes": 1, "hlo": 0, "chips": 1, "flops": 0, "data": 1, "model": 1, "train": 2, "post": 2,
    "evaluate": 2, "export": 2, "bench": 3, "bench_loader": 3, "bench_evaluation": 3, "bench_pieces": 3, "bench_population": 3, "bench_steps": 3,
    "bench_torch": 3, "talk": 3, "serve": 2, "sweep": 3, "plan": 3, "__main__": 4,
}  # fmt: skip
VERBS = {"clean", "vocab", "pack", "score", "synthesize", "merge", "evaluate", "export", "talk", "verify",
         "bench", "plan", "door", "sweep"}


def modules():
  for path in ROOT.rglob("*.py"):
    if path.name != "__init__.py":
      yield path, path.relative_to(ROOT).with_suffix("").parts


def imported(path):
  """Dotted names of the package's own modules that a file imports."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tiny_aya_jax"):
      for name in node.names:
        yield f"{node.module}.{name.name}".split(".")[1:]
    elif isinstance(node, ast.Import):
      for name in node.names:
        if name.name.startswith("tiny_aya_jax."):
          yield name.name.split(".")[1:]
        assert not name.name.startswith("experiments"), path


def test_imports_go_one_way():
  for path, parts in modules():
    for target in imported(path):
      assert FLOOR[target[0]] <= FLOOR[parts[0]], f"{path.name} imports {'.'.join(target)}"


def test_a_verb_never_imports_a_verb():
  for path, parts in modules():
    if parts[-1] in VERBS:
      for target in imported(path):
        assert not VERBS & set(target[:2]) - {"export", "evaluate", "sweep"} and target[:2] not in (
            ["export", "export"], ["evaluate", "evaluate"], ["sweep", "sweep"]), f"{path} imports {'.'.join(target)}"


def test_only_the_checkpoint_file_knows_orbax():
  for path, parts in modules():
    if parts != ("train", "checkpoint"):
      assert "import orbax" not in path.read_text(encoding="utf-8"), path


def test_data_and_tables_need_no_jax():
  for path, parts in modules():
    if parts[0] in ("data", "languages", "run", "hlo", "flops"):
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
            [name.name for name in node.names] if isinstance(node, ast.Import) else [])
        assert not any(name.split(".")[0] == "jax" for name in names), path
