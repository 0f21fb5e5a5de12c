"""Objects by import path: found, or refused with a sentence that says what is wrong."""

import os.path

import pytest
from pydantic import BaseModel, ValidationError

from trajectory.import_path import ImportPath, ImportPathError, resolve


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_found.py").write_text("class Box:\n    def brevity(self): ...\n")
    (tmp_path / "mine_needs.py").write_text("import package_that_is_missing\n")
    (tmp_path / "mine_breaks.py").write_text("1 / 0\n")
    (tmp_path / "mine_leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_what_is_there_is_found(mine):
    assert resolve("os.path:join") is os.path.join
    assert resolve("mine_found:Box.brevity").__name__ == "brevity"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mine_found", "write module:attribute"),
        ("mine_found.py:Box", "no module 'mine_found.py'"),
        ("./mine_found.py:Box", "write module:attribute"),
        ("mine_found:", "write module:attribute"),
        ("mine_fuond:Box", "there is no module 'mine_fuond' in /"),
        ("mine_found.inner:Box", "no module 'mine_found.inner'"),
        ("mine_found:box", "mine_found has no 'box'; did you mean 'Box'?"),
        ("mine_found:Box.length", "mine_found.Box has no 'length'"),
        ("mine_needs:f", "importing mine_needs raised ModuleNotFoundError: No module named 'package_that_is_missing'"),
        ("mine_breaks:f", "importing mine_breaks raised ZeroDivisionError: division by zero"),
        ("mine_leaves:f", "importing mine_leaves raised SystemExit: 3"),
    ],
)
def test_what_is_not_there_is_named(mine, path, says):
    with pytest.raises(ImportPathError) as refused:
        resolve(path)
    assert says in str(refused.value)
    assert path in str(refused.value)


def test_a_setting_is_checked_for_its_shape_and_imports_nothing(mine):
    class Setting(BaseModel):
        use: ImportPath

    assert Setting(use="mine_breaks:f").use == "mine_breaks:f"
    with pytest.raises(ValidationError, match="write module:attribute"):
        Setting(use="mine_breaks")
