// What all parts of the page share: making elements, the choice of configurations, the colours.

/** An element with these properties and children; texts are texts, never HTML. */
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A style sheet's value such as `var(--ink)`, resolved for the colours of now. */
function resolved(text) {
  const name = /^var\((--[\w-]+)\)$/.exec(text);
  return name ? getComputedStyle(document.documentElement).getPropertyValue(name[1]).trim() : text;
}

/** The state of a model's section: which configurations are left out, and who has to know. */
function openSection(section) {
  const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
  const state = { section, data, hidden: new Set(), listeners: [] };
  state.shows = (name) => !state.hidden.has(name);
  state.changed = () => state.listeners.forEach((listener) => listener());
  return state;
}

function addChoice(state) {
  const place = state.section.querySelector(".choice");
  const { configurations } = state.data;
  if (configurations.length < 2) {
    place.remove();
    return;
  }
  const boxes = configurations.map(({ name, colour }) => {
    const box = element("input", { type: "checkbox", checked: true, value: name });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(name);
      else state.hidden.add(name);
      state.changed();
    });
    const dot = element("span", { className: "dot" });
    dot.style.background = colour;
    place.append(element("label", {}, box, dot, name), " ");
    return box;
  });
  for (const [text, checked] of [["all", true], ["none", false]]) {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      state.hidden = new Set(checked ? [] : boxes.map((box) => box.value));
      boxes.forEach((box) => { box.checked = checked; });
      state.changed();
    });
    place.append(button, " ");
  }
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", "Configurations that are shown");
  place.prepend(element("div", { className: "note", textContent:
    "Configurations shown in tables, plots and samples:" }));
}

/** Light, dark or as the system says; remembered where the browser lets a file remember. */
function addThemes(whenChanged) {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["auto", "light", "dark"];
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("theme") || "auto";
  } catch { /* A file from disk may not be allowed to remember. */ }
  function show() {
    const theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
    document.documentElement.dataset.theme = theme;
    button.textContent = `Colours: ${chosen}`;
    whenChanged();
  }
  button.addEventListener("click", () => {
    chosen = themes[(themes.indexOf(chosen) + 1) % themes.length];
    try {
      localStorage.setItem("theme", chosen);
    } catch { /* as above */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  const states = [...document.querySelectorAll("section.model")].map(openSection);
  for (const state of states) {
    addChoice(state);
    state.section.querySelectorAll(".table").forEach((table) => addTable(state, table));
    addPlots(state);
    addSamples(state);
  }
  addThemes(() => states.forEach((state) => state.drawAgain()));
});
