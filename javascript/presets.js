// The lists of presets are read again when a panel is opened and when another panel or another browser tab may have
// changed them.

function sagPagRefreshPresets() {
    gradioApp().querySelectorAll("[id$=_preset_refresh]").forEach((button) => button.click());
}

onUiLoaded(() => {
    window.addEventListener("focus", sagPagRefreshPresets);
    for (const label of gradioApp().querySelectorAll(".sag-pag-panel > .label-wrap")) {
        label.addEventListener("click", sagPagRefreshPresets);
        if (label.classList.contains("open")) sagPagRefreshPresets();
    }
});
