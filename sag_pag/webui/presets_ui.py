"""The panel's preset controls. Needs gradio but not the WebUI. They are no arguments of the script."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from sag_pag.engine.plan import check_blocks
from sag_pag.settings import PARAMETERS, SWITCHES, SettingError, Settings
from sag_pag.webui import texts
from sag_pag.webui.presets import BUILT_IN, STORE, PresetError, PresetStore

try:
    from modules.ui_components import ToolButton
except ImportError:  # without the WebUI
    ToolButton = None

_SAVE, _RENAME, _DELETE = "save", "rename", "delete"
_TRANSLATE = "() => { sagPagTranslatePresets(); }"
_REFRESH_ALL = "() => { sagPagRefreshPresets(); }"
"""Makes the page show the chosen preset's name in its language, and read the list again in every panel; see
``javascript/presets.js``.
"""


class PresetControls:
    """Dropdown, buttons, and a row that asks for a name or for consent. ``connect`` ties them to the panel."""

    def __init__(self, elem_id: Callable[[str], str], *, store: PresetStore = STORE) -> None:
        self.store = store
        with gr.Row(elem_id=elem_id("preset_row")):
            self.chosen = gr.Dropdown(
                label=texts.PRESET, choices=self._names(), value=BUILT_IN[0].name, elem_id=elem_id("preset"),
                info=texts.PRESET_HELP,
            )
            self.save = _button("💾", texts.SAVE, elem_id("preset_save"))
            self.rename = _button("✏️", texts.RENAME, elem_id("preset_rename"))
            self.delete = _button("🗑️", texts.DELETE, elem_id("preset_delete"))
            self.refresh = gr.Button(texts.READ_AGAIN, visible=False, elem_id=elem_id("preset_refresh"))
            self.again = gr.Button("⟳", visible=False, elem_id=elem_id("preset_again"))
        with gr.Row(visible=False, elem_id=elem_id("preset_question")) as self.question:
            self.name = gr.Textbox(label=texts.PRESET_NAME, max_lines=1, elem_id=elem_id("preset_name"))
            self.yes = _button("✔️", texts.YES, elem_id("preset_yes"))
            self.no = _button("✖️", texts.NO, elem_id("preset_no"))
        self.asked = gr.State(("", ""))
        """What the question is about: what to do, and with which preset."""
        self.changed = gr.HTML(f"<span>{texts.CHANGED}</span>", visible=False, elem_id=elem_id("preset_changed"))
        self.status = gr.HTML(self._status(), elem_id=elem_id("preset_status"))
        for control in (
            self.chosen, self.save, self.rename, self.delete, self.refresh, self.again, self.name, self.yes, self.no,
            self.asked, self.changed, self.status,
        ):
            control.do_not_save_to_config = True

    def connect(self, controls: Sequence[Any]) -> None:
        """Ties the presets to the panel's controls, which are in the order of ``PARAMETERS``."""
        plain = {"show_progress": False, "queue": False}
        self.refresh.click(self._refresh, outputs=[self.chosen, self.status], **plain)
        sets = [*controls, self.status, self.changed, self.question]
        # "select", not "input": that one is silent where the same is chosen once more; gradio 4's "select" is so too
        self.chosen.select(self._choose, outputs=sets, **plain)
        self.again.click(self._set_to, inputs=[self.chosen], outputs=sets, **plain)
        self.chosen.change(fn=None, _js=_TRANSLATE)
        asking = [self.asked, self.question, self.name, self.status]
        self.save.click(self._ask_save, inputs=[self.chosen], outputs=asking, **plain)
        self.rename.click(self._ask_rename, inputs=[self.chosen], outputs=asking, **plain)
        self.delete.click(self._ask_delete, inputs=[self.chosen], outputs=asking, **plain)
        answer = {
            "inputs": [self.asked, self.name, *controls],
            "outputs": [self.chosen, self.question, self.status, self.changed], **plain,
        }
        for event in (self.yes.click, self.name.submit):
            event(self._do, **answer).then(fn=None, _js=_REFRESH_ALL)
        self.no.click(lambda: (gr.update(visible=False), self._status()), outputs=[self.question, self.status], **plain)

    def compare(self, chosen: str | None, values: Sequence[Any]) -> Any:
        """Says, or does not, that the panel's values are no longer those of the chosen preset.

        Folding a part switches it off in the WebUI: that is told as such.
        """
        try:
            preset = self.store.get(chosen) if chosen else None
        except PresetError:
            preset = None  # deleted elsewhere: nothing to differ from
        if preset is None:
            return gr.update(visible=False)
        others = preset.differences(dict(zip(PARAMETERS, values, strict=True)))
        switched_off = all(name in SWITCHES and wanted for name, wanted in others.items())
        text = texts.FOLDED if switched_off else texts.CHANGED
        return gr.update(visible=bool(others), value=f"<span>{text}</span>")

    def _names(self) -> list[str]:
        try:
            return [preset.name for preset in self.store.all()]
        except PresetError:
            return []  # ``_status`` says why

    def _refresh(self) -> tuple[Any, Any]:
        """The list as it is now, and whether it can't be read."""
        names, problem = self._names(), self._status()
        return gr.update(choices=names), problem or gr.update()

    def _status(self, text: str = "", *, name: str | None = None, error: object = None) -> str:
        """What stands under the dropdown; a broken file is named for as long as the WebUI runs."""
        try:
            self.store.all()
        except PresetError as unreadable:
            error = error or unreadable
        lines = [_translatable(text)] if text else []
        if name is not None:
            lines[-1] += f" <b>{html.escape(name)}</b>"
        lines += [
            f'<span class="sag-pag-error">{html.escape(str(problem))}</span>'
            for problem in (error, self.store.problem) if problem
        ]
        return "<br>".join(lines)

    def _choose(self, event: gr.SelectData) -> list[Any]:
        return self._set_to(str(event.value))

    def _set_to(self, name: str | None) -> list[Any]:
        """The preset's values; a question about another one is not asked any more."""
        try:
            preset = self.store.get(str(name))
        except PresetError as error:
            return [*(gr.update() for _ in PARAMETERS), self._status(error=error), gr.update(), gr.update()]
        values = [gr.update(value=value) for value in preset.settings().values()]
        return [*values, self._status(preset.description), gr.update(visible=False), gr.update(visible=False)]

    def _ask_save(self, chosen: str | None) -> tuple[Any, ...]:
        try:
            suggestion = self.store.get_own(chosen).name
        except PresetError:
            suggestion = ""  # nothing chosen, or one that is built in: a new name is needed
        return self._ask(_SAVE, texts.ASK_SAVE, suggestion)

    def _ask_rename(self, chosen: str | None) -> tuple[Any, ...]:
        return self._ask_about_own(_RENAME, chosen, texts.ASK_RENAME)

    def _ask_delete(self, chosen: str | None) -> tuple[Any, ...]:
        return self._ask_about_own(_DELETE, chosen, texts.ASK_DELETE)

    def _ask_about_own(self, what: str, chosen: str | None, question: str) -> tuple[Any, ...]:
        try:
            name = self.store.get_own(chosen).name
        except PresetError as error:
            return ("", ""), gr.update(visible=False), gr.update(), self._status(error=error)
        return self._ask(what, question, name)

    def _ask(self, what: str, question: str, name: str) -> tuple[Any, ...]:
        shown = gr.update(value=name, visible=what != _DELETE)
        about = name if what == _DELETE else None
        return (what, name), gr.update(visible=True), shown, self._status(question, name=about)

    def _do(self, asked: tuple[str, str], name: str, *values: Any) -> tuple[Any, ...]:
        what, about = asked
        try:
            now, done = self._change(what, about, name, values)
        except (PresetError, SettingError) as error:
            said = error.for_people if isinstance(error, SettingError) else error
            return gr.update(choices=self._names()), gr.update(), self._status(error=said), gr.update()
        status = self._status(done, name=now or about)
        return gr.update(choices=self._names(), value=now), gr.update(visible=False), status, self.compare(now, values)

    def _change(self, what: str, about: str, name: str, values: Sequence[Any]) -> tuple[str | None, str]:
        """Does what was asked for; what is chosen then, and what was done. Raises as the store and ``Settings`` do."""
        if what == _SAVE:
            settings = Settings.from_list(values)
            settings.check_order()
            check_blocks(settings, None)
            saved = self.store.save(name, settings).name
            return saved, texts.SAVED
        if what == _RENAME:
            renamed = self.store.rename(about, name).name
            return renamed, texts.RENAMED
        self.store.delete(about)
        return None, texts.DELETED


def _translatable(text: str) -> str:
    """``text`` as HTML, its ticks outside of the elements."""
    return f" {texts.TICK} ".join(f"<span>{html.escape(part)}</span>" for part in texts.parts(text))


def _button(text: str, tooltip: str, elem_id: str) -> Any:
    if ToolButton is None:
        return gr.Button(text, elem_id=elem_id, size="sm", min_width=40, scale=0)
    return ToolButton(text, elem_id=elem_id, tooltip=tooltip)
