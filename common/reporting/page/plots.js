// Plots by plotly.js, which is unpacked when the first plot comes into sight.

let unpacking = null;

/** plotly.js, from its compressed form in the page. */
function plotly() {
  unpacking ||= (async () => {
    const packed = document.getElementById("plotly").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(element("script", { textContent: await new Response(stream).text() }));
    return window.Plotly;
  })();
  return unpacking;
}

/** A copy in which colours such as var(--ink) are those of now. */
function coloured(value) {
  if (typeof value === "string") return resolved(value);
  if (Array.isArray(value)) return value.map(coloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
}

/** The traces without the configurations that are left out, whole or point by point. */
function shownTraces(state, traces) {
  return traces
    .filter((trace) => trace.configuration === undefined || state.shows(trace.configuration))
    .map((trace) => {
      if (!trace.configurations) return trace;
      const kept = trace.configurations.map(state.shows);
      const pick = (list) => list.filter((_, i) => kept[i]);
      return { ...trace, x: pick(trace.x), y: pick(trace.y), hovertext: pick(trace.hovertext) };
    });
}

/** The points that no other beats in both size and value, as a dashed line of steps. */
function paretoFront(traces, better) {
  const sign = better === "higher" ? 1 : -1;
  const points = traces.filter((trace) => trace.configuration !== undefined)
    .map((trace) => [trace.x[0], trace.y[0]])
    .sort((one, other) => one[0] - other[0] || sign * (other[1] - one[1]));
  const front = [];
  for (const [size, value] of points) {
    if (!front.length || sign * value > sign * front.at(-1)[1]) front.push([size, value]);
  }
  return {
    type: "scatter", mode: "lines", hoverinfo: "skip", x: front.map(([size]) => size),
    y: front.map(([, value]) => value),
    line: { shape: "hv", dash: "dash", width: 1, color: "var(--muted)" },
  };
}

/**
 * Where names stand beside their points, which stay where they are: the nearest place that covers
 * no other name and no point. points: {name, px, py}, pixels within a width and a height. Returns
 * for each {dx, dy}, from the point to the middle of its name, and whether that is `near`.
 */
function placeNames(points, width, height) {
  // Beside a point only its own name may stand.
  const beside = points.map(({ px, py }) => [px - 24, py - 8, px + 24, py + 8]);
  const taken = [];
  const overlap = ([l, t, r, b], [left, top, right, bottom]) =>
    Math.max(0, Math.min(r, right) - Math.max(l, left)) *
    Math.max(0, Math.min(b, bottom) - Math.max(t, top));
  return points.map(({ name, px, py }, own) => {
    const full = [...taken, ...beside.filter((_, i) => i !== own)];
    const [w, h] = [name.length * 6.6 + 6, 15];
    let best = null;
    for (const { along, up, aside } of STEPS) {
      const dx = aside * (8 + along + w / 2);
      const dy = aside ? up : up + Math.sign(up) * (8 + h / 2);
      const box = [px + dx - w / 2, py + dy - h / 2, px + dx + w / 2, py + dy + h / 2];
      const outside = w * h - overlap(box, [0, 0, width, height]);
      const cost = 20 * outside + full.reduce((sum, other) => sum + overlap(box, other), 0);
      const near = along + Math.abs(up) === 4;
      if (!best || cost < best.cost - 1e-9) best = { dx, dy, cost, box, near };
      if (best.cost < 1e-9) break;
    }
    taken.push(best.box);
    return best;
  });
}

/**
 * Steps from a point to a name's place, the nearest first: to the right or left of it, or above or
 * below. A name at another height is taken for another value, so a step up is as far as three aside.
 */
const STEPS = (() => {
  const found = [-4, -14, 4, 14].map((up) => ({ along: 0, up, aside: 0 }));
  for (const up of [0, 8, 16, 24, 34, 46, 60, 80, 104, 130].flatMap((one) => [one, -one])) {
    for (const along of [4, 14, 28, 44, 62, 84, 110, 140, 180, 230, 290, 360]) {
      for (const aside of [1, -1]) found.push({ along, up, aside });
    }
  }
  const far = ({ along, up }) => along + 3 * Math.abs(up);
  return found.sort((one, other) => far(one) - far(other));
})();

/** Names as annotations, with a line to the point where they stand farther off. */
function nameAnnotations(holder, traces) {
  // Not documented, but the only way from a value to pixels; tests/test_browser.py draws them.
  const { xaxis, yaxis } = holder._fullLayout;
  const [inWidth, inHeight] = [xaxis._length, yaxis._length];
  const shown = traces.filter((trace) => trace.configuration !== undefined)
    .map((trace) => ({
      name: trace.configuration, x: xaxis.d2l(trace.x[0]), y: yaxis.d2l(trace.y[0]),
    }))
    .map((point) => ({ ...point, px: xaxis.l2p(point.x), py: yaxis.l2p(point.y) }))
    .filter(({ px, py }) => px >= 0 && px <= inWidth && py >= 0 && py <= inHeight);
  const places = placeNames(shown, inWidth, inHeight);
  return shown.map(({ name, x, y }, i) => {
    const { dx, dy, near } = places[i];
    return {
      x, y, text: escapeTags(name), font: { size: 11, color: resolved("var(--ink)") },
      bgcolor: resolved("var(--paper)"), borderpad: 1, captureevents: false,
      ...(near
        ? { showarrow: false, xshift: dx, yshift: -dy }
        : { showarrow: true, arrowhead: 0, arrowwidth: 1, standoff: 7, ax: dx, ay: dy,
            arrowcolor: resolved("var(--muted)") }),
    };
  });
}

const escapeTags = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const longestName = (view) => Math.max(...view.traces.map(({ name }) => (name || "").length));

function fullLayout(view, narrow) {
  const axis = {
    gridcolor: "var(--line)", zerolinecolor: "var(--line)", linecolor: "var(--line)",
    automargin: true,
  };
  return coloured({
    ...view.layout,
    xaxis: { ...axis, ...view.layout.xaxis },
    yaxis: { ...axis, ...view.layout.yaxis },
    height: view.height,
    margin: { l: narrow ? 46 : 62, r: 14, t: 10, b: 46 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: "var(--ink)", size: 12, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: "var(--head)", bordercolor: "var(--line)", font: { color: "var(--ink)" } },
    hovermode: "closest",
    // With a finger a drag is for scrolling the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    legend: {
      orientation: "h", y: 1.01, yanchor: "bottom", x: 0, traceorder: "normal",
      // Without a width several short ones do not share a line on a phone.
      ...(narrow ? { font: { size: 11 }, entrywidth: 6 * longestName(view) } : {}),
    },
  });
}

/** One plot: its heading, a choice where it has several views, and how it is drawn again. */
function addPlot(state, plot, place) {
  const holder = element("div", { className: "plot" });
  holder.style.minHeight = `${plot.views[0].height}px`;
  const figure = element("figure", {}, element("h3", { textContent: plot.title }));
  if (plot.note) figure.append(element("p", { className: "note", textContent: plot.note }));
  let view = plot.views[0];
  if (plot.views.length > 1) {
    const select = element("select", { ariaLabel: `${plot.title}: which` });
    plot.views.forEach(({ label }, i) => select.append(element("option", { value: i }, label)));
    select.addEventListener("change", () => {
      view = plot.views[Number(select.value)];
      draw();
    });
    figure.append(element("div", { className: "controls" }, select));
  }
  figure.append(holder);
  place.append(figure);
  let inSight = false;
  let naming = false;

  async function draw() {
    if (!inSight) return;
    const library = await plotly();
    let traces = shownTraces(state, view.traces);
    if (view.front) traces = [paretoFront(traces, view.front), ...traces];
    const layout = fullLayout(view, holder.clientWidth < 500);
    await library.react(holder, coloured(traces), layout, { responsive: true, displayModeBar: false });
    holder.dataset.drawn = "yes";
    if (view.labels) {
      await name(library);
      if (!holder.naming) {
        holder.naming = true;
        holder.on("plotly_relayout", () => name(library));
      }
    }
  }

  async function name(library) {
    if (naming || !view.labels) return;
    naming = true; // relayout tells of itself
    try {
      await library.relayout(holder, {
        annotations: nameAnnotations(holder, shownTraces(state, view.traces)),
      });
    } finally {
      naming = false;
    }
  }

  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    inSight = true;
    draw().catch(() => {
      holder.textContent = "This browser cannot draw the plots; they need one of 2023 or newer.";
    });
  }, { rootMargin: "600px" }).observe(holder);
  return draw;
}

function addPlots(state) {
  const place = state.section.querySelector(".plots");
  if (state.data.plots.length) {
    place.append(element("p", { className: "note wide", textContent:
      "Point at something, or tap it, for its numbers; drag to zoom, double-click to zoom out again." }));
  }
  const draws = state.data.plots.map((plot) => addPlot(state, plot, place));
  state.drawAgain = () => draws.forEach((draw) => draw());
  state.listeners.push(state.drawAgain);
}
