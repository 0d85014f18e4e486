"""Numbers and the words beside them."""

from __future__ import annotations

from llm3d.wording import counted


def test_one_is_singular_and_all_else_plural() -> None:
    said = [counted(n, "reply", "replies") for n in (0, 1, 2, 1234)]
    assert said == ["0 replies", "1 reply", "2 replies", "1,234 replies"]
    assert counted(1, "step") == "1 step" and counted(3, "step") == "3 steps"
