"""What `fastlock.__all__` promises is there, documented and described; and the other way round."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlock

ROOT = Path(__file__).parents[1]
HEADINGS = re.findall(r"^### fastlock\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", fastlock.__all__)
def test_what_is_promised_is_there_and_described(name: str) -> None:
    promised = getattr(fastlock, name)
    assert name in dir(fastlock)
    if name != "__version__":
        assert inspect.getdoc(promised), name
        assert promised.__name__ == name


def test_what_is_promised_is_documented_and_the_other_way_round() -> None:
    assert sorted(HEADINGS) == sorted(fastlock.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """They read the imports under TYPE_CHECKING; Python looks the names up in the table."""
    tree = ast.parse(Path(fastlock.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == fastlock._MODULE_OF
    assert sorted(seen) == sorted(fastlock.__all__)


def test_what_is_not_promised_is_not_there() -> None:
    with pytest.raises(AttributeError, match="fastlock.*nothing_of_this_name"):
        fastlock.nothing_of_this_name  # noqa: B018


def test_modules_and_what_the_face_hands_out_have_different_names() -> None:
    modules = {path.stem for path in (ROOT / "fastlock").glob("*.py")} | {
        path.name for path in (ROOT / "fastlock").iterdir() if path.is_dir()
    }
    assert not modules & set(fastlock.__all__)


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    modules = {path.stem for folder in ("fastlock", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert not (modules - {"__init__", "__main__"}) & sys.stdlib_module_names


def test_importing_fastlock_imports_nothing_else() -> None:
    code = "import fastlock, sys; print(sorted({'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
