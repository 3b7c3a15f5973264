// The lists of presets are read again when another panel or another browser tab may have changed them.

function sagPagRefreshPresets() {
    gradioApp().querySelectorAll("[id$=_preset_refresh]").forEach((button) => button.click());
}

onUiLoaded(() => window.addEventListener("focus", sagPagRefreshPresets));
