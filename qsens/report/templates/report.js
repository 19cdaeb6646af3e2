// Charts and tables of the reports. Data comes from the JSON in the page; nothing is fetched but
// plotly, from beside this file, when the first chart comes into view.
(function () {
  "use strict";
  const holder = document.getElementById("data");
  const data = holder ? JSON.parse(holder.textContent) : {};
  const own = document.currentScript;
  const plotlyPath = own && own.dataset.plotly;
  // A server's policy names scripts by their content.
  const plotlyIntegrity = (own && own.dataset.plotlyIntegrity) || "";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PAGE_ROWS = 300;
  const FEW_ROWS = 10;
  let printing = false;

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties || {});
    node.append(...children);
    return node;
  }

  // ---- numbers, as the page's own cells show them

  function scientific(value, digits) {
    return value.toExponential(digits || 3).replace(/e([+-])(\d)$/, "e$10$2");
  }
  const show = {
    __proto__: null,
    text: (value) => String(value),
    name: (value) => String(value),
    int: (value) => String(value),
    num: (value) => String(value),
    signed: (value) => (value > 0 ? "+" : "") + (100 * value).toFixed(1) + " %",
    bits: (value) => String(Number(value.toFixed(3))),
    sci: scientific,
    pct: (value) => (value > 0 && value < 0.0001 ? "<0.01 %" : (100 * value).toFixed(2) + " %"),
    mib: (value) => ((value * 2) / 2 ** 20).toFixed(2),
    span: (value) => value.map((end) => scientific(end, 2)).join(" to "),
    places: (value) => (value[0] === value[1] ? String(value[0]) : value.join(" to ")),
    graph: () => "",
  };
  show.heat = show.pct;

  // ---- tables: sort, filter, rows beyond those of the page on demand

  function heatLevel(share, top) {
    if (share === null || share <= 0) return 0;
    return Math.max(0, Math.min(6, Math.round(6 + 2 * Math.log10(share / top))));
  }

  function setUpTable(table) {
    const heads = Array.from(table.tHead.rows[0].cells);
    const types = heads.map((head) => head.dataset.type || "text");
    const rows = [];
    for (const element of table.querySelectorAll("tbody > tr")) {
      const cells = Array.from(element.cells);
      rows.push({
        element,
        values: cells.map((cell, at) => {
          const raw = cell.dataset.v;
          if (raw !== undefined) return raw === "" ? null : Number(raw);
          const text = cell.textContent.trim();
          return types[at] === "text" || types[at] === "name" ? text : text === "–" ? null : text;
        }),
        text: element.textContent.toLowerCase(),
      });
    }
    for (const raw of (data.tables || {})[table.dataset.rest] || []) rows.push({ raw });
    const top = Number(table.dataset.top || 1);

    function valueOf(row, at) {
      if (row.values) return row.values[at];
      const value = row.raw[at];
      return Array.isArray(value) ? value[0] : value === undefined ? null : value;
    }
    function textOf(row) {
      if (row.text === undefined) row.text = row.raw.flat().join(" ").toLowerCase();
      return row.text;
    }
    function elementOf(row) {
      if (row.element) return row.element;
      row.element = make("tr");
      types.forEach((type, at) => {
        const value = row.raw[at];
        const cell = make("td", { textContent: value === null || value === undefined ? "–" : show[type](value) });
        cell.className = heads[at].dataset.cell || "";
        if (type === "heat" && value !== null) cell.className += " h" + heatLevel(value, top);
        if (heads[at].dataset.label) cell.dataset.label = heads[at].dataset.label;
        row.element.append(cell);
      });
      return row.element;
    }

    const body = table.tBodies[0] || table.createTBody();
    const count = make("span", { className: "soft" });
    count.setAttribute("role", "status");
    const filter = make("input", { type: "search", placeholder: "Filter" });
    filter.setAttribute("aria-label", "Filter the rows of this table");
    const more = make("button", { type: "button", className: "more" });
    let shown = PAGE_ROWS;
    let order = rows;
    let current = rows;

    function fill() {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      current = words.length ? order.filter((row) => words.every((word) => textOf(row).includes(word))) : order;
      const part = document.createDocumentFragment();
      for (const row of current.slice(0, shown)) part.append(elementOf(row));
      body.replaceChildren(part);
      for (const other of Array.from(table.tBodies)) if (other !== body) other.remove();
      const left = current.length - Math.min(shown, current.length);
      count.textContent = current.length + " of " + rows.length + " rows" + (left ? ", " + left + " not shown" : "");
      more.hidden = left === 0;
      more.textContent = "Show " + Math.min(PAGE_ROWS, left) + " more rows";
    }

    heads.forEach((head, at) => {
      if (types[at] === "graph") return;
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const text = types[at] === "text" || types[at] === "name";
        const start = text || types[at] === "int" || types[at] === "places" ? "ascending" : "descending";
        const now = head.getAttribute("aria-sort");
        const next = !now ? start : now === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        order = rows.slice().sort((one, other) => {
          const a = valueOf(one, at);
          const b = valueOf(other, at);
          if (a === null || b === null) return (a === null) - (b === null);
          if (typeof a === "number" && typeof b === "number") return sign * (a - b);
          return sign * String(a).localeCompare(String(b), "en", { numeric: true });
        });
        shown = PAGE_ROWS;
        fill();
      });
    });
    let waiting = 0;
    filter.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        shown = PAGE_ROWS;
        fill();
      }, 80);
    });
    more.addEventListener("click", () => {
      shown += PAGE_ROWS;
      fill();
    });
    const place = table.closest(".scroll") || table;
    if (rows.length > FEW_ROWS) place.before(make("div", { className: "tools" }, filter, count));
    place.after(more);
    fill();
  }

  // ---- charts

  // Okabe and Ito's colours: told apart without colour vision, with marks and dashes beside.
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a"];
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid"];

  // Plotly reads tags and entities in labels: names are text.
  function plain(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  function tail(text, limit) {
    return plain(text.length > limit ? "…" + text.slice(1 - limit) : text);
  }
  // On a phone a module is its layer's index and its own name.
  function short(name) {
    const match = /\.(?:layers|blocks|h)\.(\d+)\.(?:[^ ]*\.)?([^. ]+)/.exec(name);
    return match ? match[1] + " " + match[2] : name;
  }
  function percentText(value) {
    return value === null ? "no score" : show.pct(value);
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const light = printing || !dark.matches;
    return light
      ? { ink: "#18202c", soft: "#566173", line: "#e1e6ed", card: "#ffffff", none: "#f6f7f9" }
      : { ink: read("--ink"), soft: read("--soft"), line: read("--line"), card: read("--card"), none: read("--page") };
  }

  function layout(more) {
    const look = theme();
    const axis = { gridcolor: look.line, linecolor: look.line, zerolinecolor: look.line, automargin: true };
    return Object.assign(
      {
        paper_bgcolor: look.card,
        plot_bgcolor: look.card,
        font: { color: look.ink, family: "Inter, system-ui, sans-serif", size: 12 },
        margin: { l: 8, r: 12, t: 12, b: 8 },
        hoverlabel: { align: "left" },
        legend: { orientation: "h", y: -0.22 },
      },
      more,
      { xaxis: Object.assign({}, axis, more.xaxis), yaxis: Object.assign({}, axis, more.yaxis) }
    );
  }

  function labels(names, narrow) {
    return {
      tickvals: names.map((_, at) => at),
      ticktext: names.map((name) => (narrow ? tail(short(name), 18) : tail(name, 48))),
      range: [names.length - 0.5, -0.5],
      zeroline: false,
      tickfont: { size: 11 },
    };
  }

  const draw = {
    __proto__: null,
    heat(chart, choice, narrow) {
      const count = choice === "all" ? chart.names.length : Math.min(40, chart.names.length);
      const names = chart.names.slice(0, count);
      const values = chart.values.slice(0, count);
      const logs = values.map((row) => row.map((share) => (share > 0 ? Math.log10(share) : null)));
      const known = logs.flat().filter((value) => value !== null);
      const high = Math.max(...known, -1);
      return {
        traces: [
          {
            type: "heatmap",
            z: logs,
            text: values.map((row, at) =>
              row.map((share, column) => plain(names[at]) + "<br>" + plain(chart.columns[column]) + ": " + percentText(share))
            ),
            hovertemplate: "%{text}<extra></extra>",
            colorscale: "Cividis",
            zmin: Math.max(Math.min(...known, high - 1), high - 4),
            zmax: high,
            xgap: 1,
            ygap: 1,
            colorbar: {
              title: { text: "share", side: "right" },
              thickness: 12,
              tickvals: [0, -1, -2, -3, -4, -5, -6],
              ticktext: ["100 %", "10 %", "1 %", "0.1 %", "0.01 %", "10⁻⁵", "10⁻⁶"],
            },
          },
        ],
        layout: {
          height: 110 + 17 * count,
          xaxis: { tickvals: chart.columns.map((_, at) => at), ticktext: chart.columns.map((name) => tail(name, 24)), side: "top", tickangle: -40, showgrid: false },
          yaxis: Object.assign(labels(names, narrow), { showgrid: false }),
          plot_bgcolor: theme().none,
        },
      };
    },
    profile(chart) {
      return {
        traces: chart.lines.map((line, at) => ({
          type: "scatter",
          mode: "lines+markers",
          name: plain(line.name),
          x: chart.depths,
          y: line.values.map((value) => (value > 0 ? value : null)),
          text: line.values.map((value) => plain(line.name) + ": " + percentText(value)),
          hovertemplate: "layer %{x}, %{text}<extra></extra>",
          line: { color: COLOURS[at % 7], dash: DASHES[at % 7], width: 1.6 },
          marker: { symbol: MARKS[at % 7], size: 6 },
        })),
        layout: {
          height: 380,
          xaxis: { title: { text: "depth (index of the layer)" }, tickformat: "d", tick0: 0, dtick: Math.max(1, Math.ceil(chart.depths.length / 20)) },
          yaxis: { title: { text: "share of the total" }, type: "log", tickformat: ".1~%", dtick: 1 },
        },
      };
    },
    sizes(chart, choice, narrow) {
      const many = chart.sizes.length;
      return {
        traces: chart.sizes.map((size, at) => ({
          type: "scatter",
          mode: "markers",
          name: plain(size.size),
          x: size.scores.map((value) => (value > 0 ? value : null)),
          y: chart.names.map((_, row) => row + (at - (many - 1) / 2) * 0.22),
          error_x: {
            type: "data",
            symmetric: false,
            array: size.scores.map((value, row) => (size.high[row] === null ? 0 : Math.max(0, size.high[row] - value))),
            arrayminus: size.scores.map((value, row) => (size.low[row] === null ? 0 : Math.max(0, value - size.low[row]))),
            thickness: 1.2,
            width: 3,
          },
          text: chart.names.map((name) => plain(name) + ", " + size.size),
          hovertemplate: "%{text}: %{x:.3e}<extra></extra>",
          marker: { color: COLOURS[[5, 1, 0][at + 3 - many] ?? at], symbol: MARKS[at], size: 7 },
        })),
        layout: {
          height: 120 + 30 * chart.names.length,
          xaxis: { type: "log", title: { text: chart.per_token ? "score per token" : "sensitivity" }, exponentformat: "e", dtick: narrow ? 1 : undefined },
          yaxis: labels(chart.names, narrow),
        },
      };
    },
    first(chart, choice, narrow) {
      return {
        traces: [true, false].map((stable, at) => {
          const rows = chart.names.map((_, row) => row).filter((row) => chart.stable[row] === stable);
          return {
            type: "scatter",
            mode: "markers",
            name: stable ? "stable" : "undecided",
            x: rows.map((row) => chart.scores[row]),
            y: rows,
            error_x: {
              type: "data",
              symmetric: false,
              array: rows.map((row) => Math.max(0, chart.high[row] - chart.scores[row])),
              arrayminus: rows.map((row) => Math.max(0, chart.scores[row] - chart.low[row])),
            },
            text: rows.map((row) => plain(chart.names[row])),
            hovertemplate: "%{text}: %{x:.3e}<extra></extra>",
            marker: { color: COLOURS[at], symbol: stable ? "circle" : "circle-open", size: 8 },
          };
        }),
        layout: {
          height: 120 + 24 * chart.names.length,
          xaxis: { type: "log", title: { text: chart.per_token ? "score per token" : "sensitivity" }, exponentformat: "e", dtick: narrow ? 1 : undefined },
          yaxis: labels(chart.names, narrow),
          showlegend: true,
        },
      };
    },
    pareto(chart) {
      const traces = [
        {
          type: "scatter",
          mode: "lines+markers",
          name: "lowest predicted score",
          x: chart.bits,
          y: chart.damage,
          line: { color: COLOURS[0], shape: "hv" },
          hovertemplate: "%{x:.3f} bits a weight: %{y:.3e}<extra></extra>",
        },
      ];
      if (chart.chosen) {
        traces.push({
          type: "scatter",
          mode: "markers",
          name: "recipe at the target of " + plain(chart.target) + " bits",
          x: [chart.chosen[0]],
          y: [chart.chosen[1]],
          marker: { color: COLOURS[4], symbol: "star", size: 15 },
          hovertemplate: "recipe: %{x:.3f} bits a weight, %{y:.3e}<extra></extra>",
        });
      }
      return {
        traces,
        layout: {
          height: 380,
          xaxis: { title: { text: "effective bits a weight" } },
          yaxis: { title: { text: "predicted score (sum over groups)" }, rangemode: "tozero", exponentformat: "e" },
        },
      };
    },
    audit(chart) {
      const values = chart.estimate.concat(chart.truth);
      const ends = [Math.min(...values), Math.max(...values)];
      const text = chart.names.map(plain);
      const numbers = chart.ranks ? "rank %{y} by score, %{x} in truth" : "estimate %{y:.3e}, truth %{x:.3e}";
      const type = chart.ranks ? "linear" : "log";
      const axis = (title) => ({ type, title: { text: title }, exponentformat: "e" });
      return {
        traces: [
          { type: "scatter", mode: "lines", name: "equal", x: ends, y: ends, line: { color: COLOURS[6], dash: "dash", width: 1.2 }, hoverinfo: "skip" },
          {
            type: "scatter",
            mode: "markers",
            name: "groups (" + plain(chart.verdict) + ")",
            x: chart.truth,
            y: chart.estimate,
            error_y: { type: "data", array: chart.half_width.map((value) => value || 0), visible: !chart.ranks },
            text,
            hovertemplate: "%{text}: " + numbers + "<extra></extra>",
            marker: { color: COLOURS[0], size: 8 },
          },
        ],
        layout: {
          height: 420,
          xaxis: axis(chart.ranks ? "rank by true KL divergence" : "true KL divergence, nats a token"),
          yaxis: axis(chart.ranks ? "rank by score" : "estimate, nats a token"),
          showlegend: true,
        },
      };
    },
    drift(chart, choice, narrow) {
      const look = theme();
      const rows = chart.names.map((_, row) => row);
      const log = chart.before.concat(chart.after).every((value) => value > 0);
      const place = (value) => (log ? Math.log10(value) : value);
      const names = chart.names.map(plain);
      return {
        traces: [
          { type: "scatter", mode: "markers", name: "before", x: chart.before, y: rows, marker: { color: COLOURS[6], symbol: "circle-open", size: 8 }, text: names, hovertemplate: "%{text}: before %{x:.3e}<extra></extra>" },
          { type: "scatter", mode: "markers", name: "now", x: chart.after, y: rows, error_x: { type: "data", array: chart.half_width }, marker: { color: COLOURS[4], symbol: "diamond", size: 8 }, text: names, hovertemplate: "%{text}: now %{x:.3e}<extra></extra>" },
        ],
        layout: {
          height: 140 + 26 * rows.length,
          xaxis: { type: log ? "log" : "linear", title: { text: "score per token" }, exponentformat: "e" },
          yaxis: labels(chart.names, narrow),
          annotations: rows.map((row) => ({ x: place(chart.after[row]), y: row, ax: place(chart.before[row]), ay: row, xref: "x", yref: "y", axref: "x", ayref: "y", showarrow: true, arrowhead: 2, arrowwidth: 1.4, arrowcolor: look.soft, text: "" })),
        },
      };
    },
  };

  const figures = [];

  function setUpChart(figure) {
    const name = figure.dataset.chart;
    const chart = (data.charts || {})[name];
    const plot = figure.querySelector(".plot");
    // A chart by pair: {pair: chart}.
    const kind = { profiles: "profile", audits: "audit" }[name] || name;
    if (!chart || !plot || !draw[kind]) return;
    const controls = figure.querySelector(".controls");
    const state = { choice: null, drawn: false };
    const byPair = ["profiles", "sizes", "audits"].includes(name);
    let options = null;
    if (byPair) options = { label: "Pair", values: Object.keys(chart).map((key) => [key, key]) };
    if (name === "heat" && chart.names.length > 40) {
      options = { label: "Groups", values: [["first", "first 40"], ["all", (chart.left_out ? "first " : "all ") + chart.names.length]] };
    }
    if (options && options.values.length) {
      state.choice = options.values[0][0];
      const select = make("select", {}, ...options.values.map(([value, text]) => make("option", { value, textContent: text })));
      controls.append(make("label", {}, options.label + " ", select));
      select.addEventListener("change", () => {
        state.choice = select.value;
        redraw();
      });
    }
    function redraw() {
      const narrow = plot.clientWidth < 560;
      const made = draw[kind](byPair ? chart[state.choice] : chart, state.choice, narrow);
      state.drawn = true;
      return window.Plotly.react(plot, made.traces, layout(made.layout), { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
    }
    figures.push({ figure, state, redraw });
  }

  let loading = null;
  function plotly() {
    if (window.Plotly) return Promise.resolve();
    if (!loading) {
      loading = new Promise((resolve, reject) => {
        const script = make("script", { src: plotlyPath, integrity: plotlyIntegrity, onload: resolve, onerror: reject });
        document.head.append(script);
      });
    }
    return loading;
  }

  function start() {
    document.querySelectorAll("table[data-sort]").forEach(setUpTable);
    document.querySelectorAll("figure[data-chart]").forEach(setUpChart);
    const watcher = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          watcher.unobserve(entry.target);
          const shown = figures.find((one) => one.figure === entry.target);
          plotly().then(shown.redraw, () => {
            shown.figure.querySelector(".plot").textContent = "The chart needs the script " + plotlyPath + " beside this page.";
          });
        }
      },
      { rootMargin: "300px" }
    );
    figures.forEach((one) => watcher.observe(one.figure));
    const again = () => figures.forEach((one) => (one.state.drawn || printing) && window.Plotly && one.redraw());
    dark.addEventListener("change", again);
    window.addEventListener("beforeprint", () => {
      printing = true;
      again();
    });
    window.addEventListener("afterprint", () => {
      printing = false;
      again();
    });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
