// What the extension's scripts expect of the WebUI (its script.js), and the before/after slider.

const uiCallbacks = { loaded: [], update: [], afterUpdate: [], tabChange: [], options: [] };

function gradioApp() {
    const app = document.querySelector("gradio-app");
    if (!app) return document;
    app.getElementById = (id) => document.getElementById(id);
    return app.shadowRoot || app;
}
function onUiLoaded(callback) { uiCallbacks.loaded.push(callback); }
function onUiUpdate(callback) { uiCallbacks.update.push(callback); }
function onAfterUiUpdate(callback) { uiCallbacks.afterUpdate.push(callback); }
function onUiTabChange(callback) { uiCallbacks.tabChange.push(callback); }
function onOptionsChanged(callback) { uiCallbacks.options.push(callback); }
function onOptionsAvailable(callback) { uiCallbacks.options.push(callback); }

function runCallbacks(callbacks, argument) {
    for (const callback of callbacks) {
        try {
            callback(argument);
        } catch (error) {
            console.error("a script's callback failed:", error);
        }
    }
}

(function () {
    let loaded = false;
    let later = null;
    new MutationObserver((changes) => {
        if (!loaded && gradioApp().querySelector("#demo_generate")) {
            loaded = true;
            runCallbacks(uiCallbacks.loaded);
        }
        runCallbacks(uiCallbacks.update, changes);
        clearTimeout(later);
        later = setTimeout(() => runCallbacks(uiCallbacks.afterUpdate), 200);
    }).observe(document, { childList: true, subtree: true });

    document.addEventListener("input", (event) => {
        const figure = event.target.closest(".demo-compare");
        if (figure) figure.style.setProperty("--share", `${event.target.value}%`);
    });
})();
