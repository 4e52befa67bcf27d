// The browser of samples: questions that a configuration and the baseline do not both get right.

const SAMPLES_AT_ONCE = 10;

/** A select of these [value, text] pairs. */
function choiceOf(label, options) {
  const select = element("select", { ariaLabel: label });
  options.forEach(([value, text]) => select.append(element("option", { value }, text)));
  return select;
}

/** The configurations, by place, of which a sample's answer flipped in this direction. */
function flippedPlaces(sample, direction) {
  const [[baseline]] = sample.answers;
  return sample.answers.flatMap((answer, place) => {
    if (!answer || answer[0] === baseline) return [];
    return direction === "" || answer[0] === Number(direction) ? [place] : [];
  });
}

function textBlock(text, words) {
  if (text.length < 420) return element("div", { className: "text", textContent: text });
  return element("details", {}, element("summary", { textContent: words || `${text.slice(0, 160)} …` }),
    element("div", { className: "text", textContent: text }));
}

function sampleCard(state, task, sample, flips) {
  const { configurations } = state.data.samples;
  const card = element("article", { className: "sample" },
    element("h4", { textContent: `${task.title} · ${sample.id}` }));
  if (sample.passage) {
    card.append(element("details", {}, element("summary", { textContent: "Passage" }),
      element("div", { className: "text", textContent: sample.passage })));
  }
  if (sample.question) card.append(textBlock(sample.question));
  if (sample.gold) {
    card.append(element("div", { className: "gold" }, element("strong", { textContent: "Gold: " }),
      sample.gold));
  }
  // Those that say the same stand together: the baseline's answer first.
  const rows = new Map();
  sample.answers.forEach((answer, place) => {
    if (!answer || (place && !state.shows(configurations[place]))) return;
    const key = answer.join();
    rows.set(key, [...(rows.get(key) || []), place]);
  });
  const body = element("tbody");
  for (const [key, places] of rows) {
    const [right, text] = key.split(",").map(Number);
    const mark = element("span", {
      className: right ? "right" : "wrong", textContent: right ? "✓ right" : "✗ wrong",
    });
    const names = element("td");
    places.forEach((place, i) => names.append(i ? ", " : "",
      element(flips.includes(place) ? "strong" : "span", { textContent: configurations[place] })));
    body.append(element("tr", {}, element("td", {}, mark),
      element("td", {}, text < 0 ? "" : textBlock(sample.texts[text])), names));
  }
  card.append(element("table", {}, body));
  return card;
}

function addSamples(state) {
  const place = state.section.querySelector(".samples");
  const { configurations, tasks } = state.data.samples;
  if (!tasks.length) {
    place.remove();
    return;
  }
  place.append(element("h3", { textContent: "Samples whose answer flipped" }));
  const task = choiceOf("Task", tasks.map((one, i) => [i, `${one.title} (${one.samples.length} of ${one.total})`]));
  const by = choiceOf("Flipped by", [["", "flipped by any shown"],
    ...configurations.slice(1).map((name, i) => [i + 1, `flipped by ${name}`])]);
  const direction = choiceOf("Direction", [["", "either direction"], ["0", "right → wrong"],
    ["1", "wrong → right"]]);
  const search = element("input", { type: "search", placeholder: "Search texts", ariaLabel: "Search texts" });
  const count = element("span", { className: "count" });
  count.setAttribute("aria-live", "polite");
  const note = element("p", { className: "note" },
    "The questions, which are the data set's, are not in this page, and of answers only what quotes none of " +
    "them. ", element("code", { textContent: "python analyze_results.py --texts" }),
    " makes one that has them, ", element("code", { textContent: "results/report.html" }), ".");
  const list = element("div");
  const more = element("button", { type: "button", textContent: "Show more" });
  place.append(element("div", { className: "controls" }, task, by, direction, search, count), note, list, more);
  let shown = SAMPLES_AT_ONCE;

  function show() {
    const chosen = tasks[Number(task.value)];
    const wanted = search.value.toLowerCase();
    const found = chosen.samples.flatMap((sample) => {
      const flips = flippedPlaces(sample, direction.value).filter((at) =>
        (by.value === "" ? state.shows(configurations[at]) : at === Number(by.value)));
      const text = [sample.id, sample.question, sample.gold, sample.passage, ...sample.texts].join("\n");
      return flips.length && text.toLowerCase().includes(wanted) ? [[sample, flips]] : [];
    });
    count.textContent = `${found.length} of ${chosen.total} questions`;
    note.hidden = chosen.texts;
    list.replaceChildren(...found.slice(0, shown).map(([sample, flips]) =>
      sampleCard(state, chosen, sample, flips)));
    more.hidden = found.length <= shown;
  }

  function anew() {
    shown = SAMPLES_AT_ONCE;
    show();
  }
  for (const control of [task, by, direction]) control.addEventListener("change", anew);
  search.addEventListener("input", anew);
  more.addEventListener("click", () => {
    shown += SAMPLES_AT_ONCE;
    show();
  });
  state.listeners.push(show);
  show();
}
