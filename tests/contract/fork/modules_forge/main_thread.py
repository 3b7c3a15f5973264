"""The thread of the page's generations as in reForge: what a task raises is printed and dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Task:
    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.result: Any = None

    def work(self) -> None:
        self.result = self.func()


def loop(task: Task) -> Any:
    try:
        task.work()
    except Exception as error:  # noqa: BLE001 - as the host does
        print(error)  # noqa: T201
    return task.result
