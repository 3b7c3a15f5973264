// What stands beside the panel and makes its head say less than the truth: a plot that decides, other extensions whose
// work is not in the count of costs. Without this file the head is silent about them.
(function() {
    "use strict";

    // The words for it come with the panel, so that the WebUI can translate them.
    function badge(label, panel, words, className) {
        const made = document.createElement("span");
        made.className = className;
        made.hidden = true;
        const said = document.createElement("span");
        said.textContent = panel.querySelector(words).textContent;
        made.append(said);
        label.append(made);
        return made;
    }

    // While an X/Y/Z plot has one of our axes it decides, whatever the panel says.
    function plotDecides(scripts) {
        const axes = Array.from(scripts.querySelectorAll("[id*=_xyz_plot_][id$=_type] input"));
        // whether it is seen is asked last: that makes the browser lay out the page
        return axes.some((axis) => /^\[(SAG|PAG|SAG\/PAG)\]/.test(axis.value) && axis.offsetParent);
    }

    // The boxes that switch something on, by their labels before any translation.
    function switches(scripts) {
        const boxes = (window.gradio_config ? window.gradio_config.components : [])
            .filter(({type, props}) => type === "checkbox" && /^(enabled?|activ(e|ate))\b/i.test(props.label || ""))
            .map(({id, props}) => gradioApp().getElementById(props.elem_id || `component-${id}`));
        return boxes.filter((box) => box && scripts.contains(box)).map((box) => box.querySelector("input")).filter(Boolean);
    }

    const HEAD = ":scope > .label-wrap";

    // What an extension has on the page is an accordion that is in no other one.
    function extensionsIn(scripts) {
        const outside = scripts.parentElement.closest(".gradio-accordion");
        return Array.from(scripts.querySelectorAll(".gradio-accordion"))
            .filter((accordion) => accordion.parentElement.closest(".gradio-accordion") === outside);
    }

    // Names of the other extensions that are on: by the box in their own head or, where there is none, by one inside.
    function others(scripts, panel, boxes) {
        const on = extensionsIn(scripts).filter((extension) => {
            if (extension === panel) return false;
            const own = extension.querySelector(`${HEAD} input[type=checkbox]`);
            return own ? own.checked : boxes.some((box) => box.checked && extension.contains(box));
        });
        // without what they add to it, such as how many of their units are on
        const title = (extension) => Array.from(extension.querySelector(`${HEAD} > span:not(.icon)`).childNodes)
            .filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.textContent).join("").trim();
        return on.map(title).filter(Boolean);
    }

    function follow(panel, scripts) {
        const label = panel.querySelector(".label-wrap"), head = label.querySelector(".sag-pag-head");
        const plot = badge(label, panel, ".sag-pag-plot-decides", "sag-pag-plot");
        label.insertBefore(plot, head);
        const beside = badge(label, panel, ".sag-pag-not-counting", "sag-pag-beside");
        const names = document.createElement("b");
        beside.append(" ", names);
        const boxes = switches(scripts);
        const update = () => {
            plot.hidden = !plotDecides(scripts);
            const found = others(scripts, panel, boxes).join(", ");
            if (names.textContent !== found) names.textContent = found;
            beside.hidden = !found || !head.querySelector(".sag-pag-price");
        };
        update();
        for (const kind of ["change", "click", "focusout"]) scripts.addEventListener(kind, () => setTimeout(update, 300));
        if (typeof onAfterUiUpdate === "function") onAfterUiUpdate(update);
    }

    onUiLoaded(() => {
        for (const panel of gradioApp().querySelectorAll(".sag-pag-panel.sag-pag-ready")) {
            const tab = panel.id.includes("_img2img_") ? "img2img" : "txt2img";
            const scripts = gradioApp().getElementById(`${tab}_script_container`);
            if (scripts) follow(panel, scripts);
        }
    });
})();
