"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const off = new Set(); // runs that are not shown
  const plots = [];

  // --- curves
  const short = (value) => value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString();

  function draw(chart) {
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = figure.appendChild(document.createElement("figcaption"));
    caption.textContent = chart.title;
    const stage = figure.appendChild(document.createElement("div"));
    stage.tabIndex = 0;
    stage.setAttribute("role", "img");
    const told = figure.appendChild(document.createElement("output"));
    const ends = chart.series.map((s) => `${data.names[s.run]}, ${s.kind}: ${short(s.y[s.y.length - 1])}`);
    stage.setAttribute("aria-label", `Curves of ${chart.title} over epochs. At the end: ${ends.join("; ")}. Arrow keys read other epochs.`);
    document.getElementById(chart.more ? "more" : "charts").appendChild(figure);
    const values = uPlot.join(chart.series.map((s) => [s.x, s.y]));
    const axis = { stroke: () => colour("--soft"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { stroke: () => colour("--line") }, font: "12px system-ui, sans-serif" };
    const line = (s) => ({
      stroke: () => colour(`--run${s.run % 12}`), spanGaps: true, show: !off.has(s.run),
      width: s.kind === "training" ? 1 : 2, alpha: s.kind === "training" && !chart.more ? 0.65 : 1,
      dash: s.run >= 12 ? [6, 4] : undefined,
      points: { show: s.x.length < 2 || (s.kind === "validation" && s.x.length <= 40), size: 5 },
    });
    const say = (plot) => {
      const at = plot.cursor.idx;
      told.textContent = "";
      if (at === null || at === undefined) return;
      told.append(`epoch ${short(values[0][at])}: `);
      chart.series.forEach((s, i) => {
        if (off.has(s.run)) return;
        let near = null; // the newest point up to here
        for (let k = at; k >= 0 && near === null; k--) near = values[i + 1][k] ?? null;
        const part = told.appendChild(document.createElement("b"));
        part.textContent = `${data.names[s.run]}${chart.series.some((o) => o.run === s.run && o.kind !== s.kind) ? ` ${s.kind}` : ""} ${short(near)}`;
        told.append("  ");
      });
    };
    const plot = new uPlot({
      width: stage.clientWidth, height: 230, legend: { show: false }, padding: [8, 8, 0, 0],
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 34 }, { ...axis, size: 58, values: (_, ticks) => ticks.map(short) }],
      series: [{}, ...chart.series.map(line)], hooks: { setCursor: [say] },
    }, values, stage);
    stage.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const last = values[0].length - 1;
      const at = Math.min(last, Math.max(0, (plot.cursor.idx ?? (step > 0 ? -1 : last + 1)) + step));
      plot.setCursor({ left: plot.valToPos(values[0][at], "x"), top: 10 });
    });
    plots.push({ plot, stage, chart });
  }

  const drawn = { charts: false, more: false };
  const drawAll = (id) => {
    if (drawn[id]) return;
    drawn[id] = true;
    data.charts.filter((c) => c.more === (id === "more")).forEach(draw);
  };
  if (data.charts.length) {
    drawAll("charts");
    const more = document.getElementById("more-curves");
    more.addEventListener("toggle", () => more.open && drawAll("more"));
    more.hidden = !data.charts.some((c) => c.more);
    addEventListener("resize", () => plots.forEach(({ plot, stage }) => plot.setSize({ width: stage.clientWidth, height: 230 })));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(({ plot }) => plot.redraw(false, true)));
  }

  // --- which runs are shown
  const filter = document.getElementById("filter");
  filter?.addEventListener("change", (event) => {
    const run = Number(event.target.value), shown = event.target.checked;
    if (shown) off.delete(run); else off.add(run);
    document.querySelectorAll(`[data-run="${run}"]`).forEach((part) => { part.hidden = !shown; });
    plots.forEach(({ plot, chart }) => chart.series.forEach((s, i) => s.run === run && plot.setSeries(i + 1, { show: shown })));
  });

  // --- sorted tables
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        return cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort.replace("inf", "Infinity"));
      };
      const order = (a, b) => typeof a === "number" && typeof b === "number"
        ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b), undefined, { numeric: true });
      const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b)) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    }));
  });

  // --- settings that have a word
  document.getElementById("search")?.addEventListener("input", (event) => {
    const word = event.target.value.trim().toLowerCase();
    for (const row of document.getElementById("settings-table").tBodies[0].rows) {
      row.hidden = !row.textContent.toLowerCase().includes(word);
    }
  });

  // --- enlarged pictures
  const dialog = document.getElementById("zoom"), large = dialog.querySelector("img");
  document.querySelectorAll("button.zoom").forEach((button) => button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    large.src = picture.src;
    large.alt = picture.alt;
    large.className = button.classList.contains("wide") ? "wide" : "";
    document.getElementById("zoom-caption").textContent = picture.alt;
    dialog.showModal();
  }));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
})();
