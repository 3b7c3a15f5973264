"""As much of gradio as the panel needs: components that remember what they were made with."""

from __future__ import annotations

from typing import Any


class Block:
    """A component or a container."""

    def __init__(self, value: Any = None, **kwargs: Any) -> None:
        self.value = kwargs.pop("value", value)
        self.kwargs = kwargs
        self.elem_id = kwargs.get("elem_id")
        self.label = kwargs.get("label")
        made.append(self)

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _listen(self, fn: Any, **kwargs: Any) -> Block:
        """An event, which the double never fires."""
        return self

    change = click = select = submit = then = _listen


def Warning(message: str) -> None:  # noqa: N802 - gradio's name
    """A message on the page."""
    shown.append(message)


def Info(message: str) -> None:  # noqa: N802 - gradio's name
    """A message on the page that is no warning."""
    shown.append(message)


def update(**changes: Any) -> dict[str, Any]:
    """A change of a component."""
    return changes


shown: list[str] = []
"""Every message so far."""

made: list[Block] = []
"""Every component in the order of making."""


class Accordion(Block):
    pass


class Blocks(Block):
    pass


class Button(Block):
    pass


class State(Block):
    pass


class Checkbox(Block):
    pass


class Group(Block):
    pass


class HTML(Block):
    pass


class Markdown(Block):
    pass


class Radio(Block):
    pass


class Dropdown(Block):
    pass


class Row(Block):
    pass


class Column(Block):
    pass


class Slider(Block):
    pass


class Textbox(Block):
    pass
