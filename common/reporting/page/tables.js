// Tables that are sorted by a click on a heading and filtered by words.

/** The number that a cell begins with, such as -0.009 of "-0.009 [-0.026, +0.008]", of "> 1000000"
 * what it is at least; else null. */
function leadingNumber(text) {
  const found = /^(?:[<>] )?([+\-−]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)(?=$|[\s(±%×])/i.exec(text);
  return found ? Number(found[1].replaceAll(",", "").replace("−", "-")) : null;
}

const isEmpty = (text) => text === "" || text === "–";

/** How two rows compare by a column: as numbers where all its cells begin with one. */
function comparer(rows, column) {
  const text = (row) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
  const numeric = rows.every((row) => isEmpty(text(row)) || leadingNumber(text(row)) !== null);
  return (one, other, sign) => {
    const [a, b] = [text(one), text(other)];
    // What is not there stands last, whichever the direction.
    if (isEmpty(a) || isEmpty(b)) return isEmpty(a) - isEmpty(b);
    if (numeric) return sign * (leadingNumber(a) - leadingNumber(b));
    return sign * a.localeCompare(b, "en", { numeric: true });
  };
}

function addTable(state, place) {
  const table = place.querySelector("table");
  const [body] = table.tBodies;
  const original = [...body.rows];
  const search = element("input", {
    type: "search", placeholder: "Filter rows, e.g. 4bit loss", ariaLabel: "Filter rows",
  });
  const count = element("span", { className: "count" });
  count.setAttribute("aria-live", "polite");

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of original) {
      const text = row.textContent.toLowerCase();
      const name = row.dataset.configuration;
      const fits = (name === undefined || state.shows(name)) && words.every((w) => text.includes(w));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown < original.length ? `${shown} of ${original.length} rows` : "";
  }

  for (const heading of table.tHead.rows[0].cells) {
    const button = element("button", { type: "button", title: "Sort" });
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const now = { null: "ascending", ascending: "descending", descending: null }[before];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      let order = original;
      if (now) {
        heading.setAttribute("aria-sort", now);
        const compare = comparer(original, heading.cellIndex);
        const sign = now === "ascending" ? 1 : -1;
        order = [...original].sort((one, other) => compare(one, other, sign));
      }
      body.append(...order);
    });
  }
  if (original.length > 1) {
    const controls = element("div", { className: "controls" }, search, count);
    place.querySelector(".box").before(controls);
  }
  search.addEventListener("input", filter);
  state.listeners.push(filter);
}
