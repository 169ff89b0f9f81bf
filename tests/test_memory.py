import psutil

from stsr_core.memory import available


def test_a_machine_without_containers_has_what_the_system_says(tmp_path):
    assert 0 < available(tmp_path) <= psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves(tmp_path):
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert available(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert available(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path) > 5_000_000
