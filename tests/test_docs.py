"""The documentation's programs run and do what the text says."""

from __future__ import annotations

import re

import pytest

from laws_ros.runtime.files import share_path


def test_the_penalty_in_a_training_loop_of_ones_own(capsys):
    pytest.importorskip("torch", reason="training needs PyTorch: make torch")
    (program,) = re.findall(r"```python\n(.*?)```", share_path("docs/cacheable-training.md").read_text(), re.S)
    found: dict = {}
    exec(compile(program, "cacheable-training.md", "exec"), found)
    assert found["gap_cacheable"] < 0.3 * found["gap_plain"]
    assert found["error_cacheable"] < 0.05
    assert "gap" in capsys.readouterr().out
