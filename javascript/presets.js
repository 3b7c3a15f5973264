// The lists of presets are read again when a panel is opened and when another panel or another browser tab may have
// changed them.

function sagPagRefreshPresets() {
    gradioApp().querySelectorAll(".sag-pag-panel [id$=_preset_refresh]").forEach((button) => button.click());
}

onUiLoaded(() => {
    const open = () => gradioApp().querySelector(".sag-pag-panel > .label-wrap.open");
    window.addEventListener("focus", () => open() && sagPagRefreshPresets());
    for (const label of gradioApp().querySelectorAll(".sag-pag-panel > .label-wrap")) {
        label.addEventListener("click", sagPagRefreshPresets);
    }
    if (open()) sagPagRefreshPresets();
});
