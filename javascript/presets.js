// The lists of presets are read again when a panel is opened and when another panel or another browser tab may have
// changed them.

function sagPagRefreshPresets() {
    gradioApp().querySelectorAll(".sag-pag-panel [id$=_preset_refresh]").forEach((button) => button.click());
}

// The WebUI translates the list; the name that is chosen stands in a box, which it leaves alone.
function sagPagTranslatePresets() {
    const words = window.localization || {};
    setTimeout(() => gradioApp().querySelectorAll(".sag-pag-panel [id$=_preset] input").forEach((box) => {
        if (Object.hasOwn(words, box.value)) box.value = words[box.value];
    }));
}

// gradio 4 says nothing of a preset that is chosen once more.
function sagPagListenForSamePreset(list) {
    const again = gradioApp().getElementById(`${list.id}_again`);
    const chosen = (option) => option && option.getAttribute("aria-selected") === "true" && again.click();
    list.addEventListener("mousedown", (event) => chosen(event.target.closest("li")), true);
    list.addEventListener("keydown", (event) => event.key === "Enter" && chosen(list.querySelector("li.active")), true);
}

onUiLoaded(() => {
    const open = () => gradioApp().querySelector(".sag-pag-panel > .label-wrap.open");
    window.addEventListener("focus", () => open() && sagPagRefreshPresets());
    for (const label of gradioApp().querySelectorAll(".sag-pag-panel > .label-wrap")) {
        label.addEventListener("click", sagPagRefreshPresets);
    }
    if (open()) sagPagRefreshPresets();
    sagPagTranslatePresets();
    if (parseInt(window.gradio_config.version) >= 4) {
        gradioApp().querySelectorAll(".sag-pag-panel [id$=_preset]").forEach(sagPagListenForSamePreset);
    }
});
