// The U-Net block map of the guidance panel, and what the closed panel says of itself.
// The maps, costs and messages come from the server; the text fields hold the truth. Without this file the panel
// works all the same: block names are typed.
(function() {
    "use strict";

    const field = (map) => map.closest(".sag-pag-blocks").querySelector("textarea, input");
    const cells = (map, selector) => Array.from(map.querySelectorAll(selector || "button.sag-pag-cell"));
    const words = (text) => text.split(" ").filter(Boolean);

    // Which sites are chosen is kept on the map; every button shows it for its own ones.
    function show(map) {
        const chosen = new Set(words(map.dataset.chosen));
        for (const cell of cells(map)) {
            const sites = words(cell.dataset.sites);
            const count = sites.filter((site) => chosen.has(site)).length;
            cell.setAttribute("aria-pressed", count === 0 ? "false" : count === sites.length ? "true" : "mixed");
        }
        if (!map.querySelector("button[tabindex='0']")) {
            const first = map.querySelector(".sag-pag-u button[aria-pressed='true']") || map.querySelector("button");
            if (first) first.tabIndex = 0;
        }
    }

    // The shortest text for the chosen sites, in the U-Net's order.
    function namesOf(map, chosen) {
        const names = [];
        for (const block of cells(map, ".sag-pag-u button")) {
            const sites = words(block.dataset.sites);
            const own = sites.filter((site) => chosen.has(site));
            if (own.length === sites.length) names.push(block.dataset.name);
            else names.push(...own);
        }
        return names.join(", ");
    }

    function write(map, chosen) {
        map.dataset.chosen = Array.from(chosen).join(" ");
        show(map);
        const input = field(map);
        input.value = namesOf(map, chosen);
        input.dispatchEvent(new Event("input", {bubbles: true}));
    }

    // The cells from the one chosen before to this one, in the order of the map.
    function range(map, cell) {
        const row = cells(cell.parentElement);
        const anchor = row.find((other) => other.dataset.name === map.dataset.anchor);
        if (!anchor) return [cell];
        const [first, last] = [row.indexOf(anchor), row.indexOf(cell)].sort((a, b) => a - b);
        return row.slice(first, last + 1);
    }

    function choose(cell, extend) {
        const map = cell.closest(".sag-pag-map");
        const chosen = new Set(words(map.dataset.chosen));
        if (map.dataset.choose === "one") {
            write(map, new Set(words(cell.dataset.sites)));
        } else if (extend) {
            for (const other of range(map, cell)) words(other.dataset.sites).forEach((site) => chosen.add(site));
            write(map, chosen);
        } else {
            const remove = cell.getAttribute("aria-pressed") === "true";
            for (const site of words(cell.dataset.sites)) remove ? chosen.delete(site) : chosen.add(site);
            write(map, chosen);
        }
        if (!extend) map.dataset.anchor = cell.dataset.name;
    }

    function showAbout(map, kind) {
        for (const part of map.querySelector(".sag-pag-about").children) {
            part.hidden = !part.classList.contains(kind);
        }
    }

    // Says what the cell is, or why it can't be chosen, and opens its block's transformer blocks.
    function describe(cell) {
        const map = cell.closest(".sag-pag-map");
        const kind = cell.classList.contains("sag-pag-empty") ? "sag-pag-none" : "sag-pag-block";
        showAbout(map, kind);
        for (const place of map.querySelectorAll(`.${kind} [data-field]`)) {
            place.textContent = cell.dataset[place.dataset.field];
        }
        if (kind === "sag-pag-block" && !cell.closest(".sag-pag-depths")) {
            for (const depths of map.querySelectorAll(".sag-pag-depths")) {
                depths.hidden = depths.dataset.block !== cell.dataset.name;
            }
        }
    }

    const forget = (map) => showAbout(map, "sag-pag-hint");

    function move(cell, key) {
        const map = cell.closest(".sag-pag-map");
        const all = cells(map).filter((other) => other.offsetParent !== null);
        const here = all.indexOf(cell);
        const next = {
            ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0,
            End: all.length - 1,
        }[key];
        if (next === undefined || !all[next]) return false;
        for (const other of cells(map)) other.tabIndex = -1;
        all[next].tabIndex = 0;
        all[next].focus();
        return true;
    }

    const cellOf = (event) => event.target.closest && event.target.closest(".sag-pag-map button.sag-pag-cell");
    const placeOf = (event) => event.target.closest && event.target.closest(".sag-pag-map .sag-pag-cell");

    function listen(root) {
        root.addEventListener("click", (event) => {
            const cell = cellOf(event);
            if (cell) choose(cell, event.shiftKey);
        });
        root.addEventListener("keydown", (event) => {
            const cell = cellOf(event);
            if (cell && !event.ctrlKey && !event.altKey && !event.metaKey && move(cell, event.key)) {
                event.preventDefault();
            }
        });
        for (const kind of ["mouseover", "focusin"]) {
            root.addEventListener(kind, (event) => placeOf(event) && describe(placeOf(event)));
        }
        root.addEventListener("mouseout", (event) => {
            const map = event.target.closest(".sag-pag-map");
            if (map && !map.contains(event.relatedTarget) && !map.contains(document.activeElement)) forget(map);
        });
    }

    // What comes from the server: a new map, or what a typed text chooses.
    function follow(column) {
        const update = () => {
            const map = column.querySelector(".sag-pag-map");
            const state = column.querySelector(".sag-pag-state [data-chosen]");
            if (!map) return;
            // Answers may overtake each other: what is about an older text is not shown.
            const input = field(map);
            if (map !== column.lastMap) {
                if (column.lastMap && map.dataset.text !== input.value) map.dataset.chosen = column.lastMap.dataset.chosen;
                show(map);
            }
            if (state && state !== column.lastState && state.dataset.text === input.value) {
                column.lastState = state;
                map.dataset.chosen = state.dataset.chosen;
                show(map);
            }
            column.lastMap = map;
            const wrong = column.querySelector(".sag-pag-error");
            if (wrong) wrong.hidden = wrong.dataset.text !== input.value;
            wrong && !wrong.hidden ? input.setAttribute("aria-invalid", "true") : input.removeAttribute("aria-invalid");
            if (wrong && !wrong.hidden) {  // what was chosen before is not what the text says
                map.dataset.chosen = "";
                show(map);
            }
        };
        for (const part of column.querySelectorAll(".sag-pag-state, .sag-pag-mapping")) {
            new MutationObserver(update).observe(part, {childList: true, subtree: true});
        }
        update();
    }

    // Keeps a copy of what the server says of something closed in its head.
    function copied(label, source, className) {
        const copy = document.createElement("span");
        copy.className = className;
        label.insertBefore(copy, label.lastElementChild);
        const update = () => {
            const said = source.querySelector(".sag-pag-line, .sag-pag-not-default");
            const html = said ? said.innerHTML : "";
            if (copy.innerHTML !== html) copy.innerHTML = html;
        };
        new MutationObserver(update).observe(source, {childList: true, subtree: true, characterData: true});
        update();
    }

    // The head of an accordion is a button, also for the keyboard and for screen readers. Where it holds a checkbox, which
    // is one already, its arrow is. gradio 4's head is a button as it is, and the checkbox is taken out of it.
    function asButton(label) {
        const isButton = label.tagName === "BUTTON", box = label.querySelector("input");
        const button = isButton || !box ? label : label.lastElementChild;
        if (isButton && box) {
            box.classList.add("sag-pag-apart");
            label.before(box);
        }
        const told = () => button.setAttribute("aria-expanded", String(label.classList.contains("open")));
        new MutationObserver(told).observe(label, {attributes: true, attributeFilter: ["class"]});
        told();
        if (isButton) return;
        if (button !== label) button.setAttribute("aria-label", label.textContent.replace(button.textContent, "").trim());
        button.tabIndex = 0;
        button.setAttribute("role", "button");
        button.addEventListener("keydown", (event) => {
            if (event.target !== button || (event.key !== "Enter" && event.key !== " ")) return;
            event.preventDefault();
            label.click();
        });
    }

    // Names for screen readers that gradio and the WebUI leave out: a slider's number, an accordion's checkbox.
    function name(panel) {
        for (const input of panel.querySelectorAll("input[type=number]:not([aria-label])")) {
            const label = input.closest(".block").querySelector("[data-testid=block-info]");
            if (label) input.setAttribute("aria-label", label.textContent.trim());
        }
        for (const input of panel.querySelectorAll("[id$=-visible-checkbox]")) {
            const label = input.closest(".label-wrap") || input.nextElementSibling;
            input.setAttribute("aria-label", label.textContent.replace(label.lastElementChild.textContent, "").trim());
        }
    }

    // The terms of those who know the field are in tooltips: of a choice the word that pictures and programs know, of a
    // number what the panel has brought along, read late because the WebUI translates it when it likes.
    function tellTerms(panel) {
        const texts = panel.querySelector(".sag-pag-texts"), words = texts.dataset.words.split("|");
        for (const input of panel.querySelectorAll("input[type=radio]")) {
            if (words.includes(input.value)) input.closest("label").title = input.value;
        }
        for (const term of texts.querySelectorAll("[data-for]")) {
            const control = gradioApp().getElementById(panel.id.replace(/panel$/, term.dataset.for));
            control.addEventListener("mouseenter", () => { control.title = term.textContent; });
        }
    }

    function setUp(panel) {
        listen(panel);
        copied(panel.querySelector(".label-wrap"), panel.querySelector(".sag-pag-cost"), "sag-pag-head");
        for (const fold of panel.querySelectorAll(".sag-pag-fold")) {
            const source = gradioApp().getElementById(fold.id.replace(/_more$/, "_summary"));
            copied(fold.querySelector(".label-wrap"), source, "sag-pag-aside");
        }
        panel.querySelectorAll(".label-wrap").forEach(asButton);
        for (const input of panel.querySelectorAll("[id$=_preset] input")) input.readOnly = true;  // chosen, not typed
        name(panel);
        tellTerms(panel);
        panel.querySelectorAll(".sag-pag-blocks").forEach(follow);
        panel.classList.add("sag-pag-ready");
    }

    const panels = () => Array.from(gradioApp().querySelectorAll(".sag-pag-panel"));
    const answered = (panel) => panel.querySelector(".sag-pag-mapping .sag-pag-map, .sag-pag-mapping .sag-pag-hint");
    const isOpen = (panel) => panel.querySelector(".label-wrap").classList.contains("open");
    // A closed panel with nothing on shows nothing that could be out of date, and the page is there sooner.
    const isSeen = (panel) => isOpen(panel) || panel.querySelector("input[type=checkbox]:checked");
    const REST = 200, SOON = 1000, PATIENCE = 60000;  // milliseconds
    let checkpoint = null, held = false;

    // While a slider is held nothing is asked, however slowly it is dragged.
    window.addEventListener("pointerdown", (event) => { held = event.target.type === "range"; }, true);
    for (const kind of ["pointerup", "pointercancel"]) window.addEventListener(kind, () => { held = false; }, true);

    function ask(panel, redraw) {
        clearTimeout(panel.sagPagChanging);
        panel.sagPagRedraw = false;
        panel.querySelector(redraw ? ".sag-pag-refresh" : ".sag-pag-recount").click();
    }

    const refresh = (panel) => isSeen(panel) && ask(panel, true);

    // Called by every control on every change: asks once, when the changing has come to rest.
    window.sagPagChanged = (id, redraw) => {
        const panel = gradioApp().getElementById(id);
        if (!panel || !isSeen(panel)) {
            if (panel) panel.sagPagStale = true;
            return;
        }
        panel.sagPagRedraw = panel.sagPagRedraw || redraw;
        const askWhenAtRest = () => {
            clearTimeout(panel.sagPagChanging);
            panel.sagPagChanging = setTimeout(
                () => held ? askWhenAtRest() : ask(panel, panel.sagPagRedraw), REST,
            );
        };
        askWhenAtRest();
    };

    // In img2img "Resize by" makes the picture's size out of the source's, which the page alone knows.
    window.sagPagSized = (id, values, [width, height]) => {
        const chosen = gradioApp().querySelector("#img2img_tabs_resize > .tab-nav button.selected");
        const byScale = id.includes("_img2img_") && chosen && chosen.textContent.trim() !== "" &&
            chosen === chosen.parentElement.lastElementChild;
        const scale = byScale && parseFloat(gradioApp().querySelector("#img2img_scale input").value);
        if (!scale || typeof currentImg2imgSourceResolution !== "function") return values;
        const [sourceWidth, sourceHeight] = currentImg2imgSourceResolution(0, 0, scale);
        if (!sourceWidth || !sourceHeight) return values;
        const sized = Array.from(values);
        sized[width] = Math.floor(sourceWidth * scale);
        sized[height] = Math.floor(sourceHeight * scale);
        return sized;
    };

    // The page may not listen yet when it says that it is loaded, and the model may not be loaded yet: then it is asked
    // for ever more rarely.
    function refreshUntilAnswered(panel, tries, wait) {
        ask(panel, true);
        clearTimeout(panel.sagPagAsking);
        panel.sagPagAsking = setTimeout(() => {
            if (panel.querySelector(".sag-pag-waiting")) {
                if (isSeen(panel)) refreshUntilAnswered(panel, tries, Math.min(2 * wait, PATIENCE));
            } else if (tries > 1 && !answered(panel)) {
                refreshUntilAnswered(panel, tries - 1, wait);
            }
        }, wait);
    }

    // What else makes img2img's size: the tab, the scale and the source.
    function followSource(panel) {
        if (!panel.id.includes("_img2img_")) return;
        const changed = () => window.sagPagChanged(panel.id, true);
        const tabs = gradioApp().querySelector("#img2img_tabs_resize");
        if (tabs) tabs.addEventListener("click", changed);
        const preview = gradioApp().querySelector("#img2img_scale_resolution_preview");
        if (preview) new MutationObserver(changed).observe(preview, {childList: true, subtree: true, characterData: true});
    }

    // Forge and its kin load the checkpoint that is chosen when they make the next picture: its map is there once the
    // button that skips a picture is gone.
    function followCheckpointOfForks() {
        const choice = gradioApp().querySelector(".model_selection input");
        let loaded = choice && choice.value;
        for (const tab of choice ? ["txt2img", "img2img"] : []) {
            const skip = gradioApp().getElementById(`${tab}_skip`);
            const changed = () => {
                if (skip.style.display === "block" || choice.value === loaded) return;
                loaded = choice.value;
                for (const panel of panels()) window.sagPagChanged(panel.id, true);
            };
            if (skip) new MutationObserver(changed).observe(skip, {attributes: true, attributeFilter: ["style"]});
        }
    }

    onUiLoaded(() => {
        followCheckpointOfForks();
        for (const panel of panels()) {
            setUp(panel);
            followSource(panel);
            panel.querySelector(".label-wrap").addEventListener("click", () => {
                if (!panel.querySelector(".sag-pag-map")) refreshUntilAnswered(panel, 10, SOON);
                else if (panel.sagPagStale) ask(panel, true);
                panel.sagPagStale = false;
            });
            if (isSeen(panel)) refreshUntilAnswered(panel, 10, SOON);
        }
    });
    if (typeof onOptionsChanged === "function") {
        onOptionsChanged(() => {
            if (checkpoint !== null && checkpoint !== opts.sd_checkpoint_hash) {
                for (const panel of panels()) {
                    panel.sagPagStale = true;
                    refresh(panel);
                }
            }
            checkpoint = opts.sd_checkpoint_hash;
        });
    }
})();
