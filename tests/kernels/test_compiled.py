"""Compiled code that stems from other sources goes, all else stays."""

from pathlib import Path

from kernels.compiled import forget_stale


def make_package(path: Path) -> list[Path]:
    (path / "__pycache__").mkdir()
    (path / "one.py").write_text("one = 1")
    (path / "other.py").write_text("other = 2")
    compiled = [path / "__pycache__" / name for name in ("one.f-1.py311.nbi", "one.f-1.py311.1.nbc")]
    for file in compiled:
        file.touch()
    return compiled


def test_what_stems_from_nobody_knows_what_goes_and_what_is_made_then_stays(tmp_path: Path) -> None:
    compiled = make_package(tmp_path)
    bytecode = tmp_path / "__pycache__" / "one.cpython-311.pyc"
    bytecode.touch()
    assert forget_stale(tmp_path)
    assert not any(file.exists() for file in compiled)
    compiled[0].touch()
    assert not forget_stale(tmp_path)
    assert compiled[0].exists()
    assert bytecode.exists()


def test_a_change_of_any_file_of_the_package_lets_the_code_of_all_go(tmp_path: Path) -> None:
    compiled = make_package(tmp_path)
    forget_stale(tmp_path)
    compiled[0].touch()
    (tmp_path / "other.py").write_text("other = 3")
    assert forget_stale(tmp_path)
    assert not compiled[0].exists()
    compiled[0].touch()
    (tmp_path / "other.py").unlink()
    assert forget_stale(tmp_path)
    assert not compiled[0].exists()


def test_a_package_without_a_cache_gets_none_of_compiled_code(tmp_path: Path) -> None:
    (tmp_path / "one.py").touch()
    assert forget_stale(tmp_path)
    assert [file.name for file in (tmp_path / "__pycache__").iterdir()] == ["sources.digest"]
