(() => {
  "use strict";
  const BAND = 28; // pixels of one row of a plot
  const data = JSON.parse(document.getElementById("study-data").textContent);
  const picks = [...document.querySelectorAll("select[data-field]")];
  const views = new Map();

  function unpack({ length, columns }) {
    const rows = Array.from({ length }, () => ({}));
    for (const [name, { words, at, values }] of Object.entries(columns)) {
      rows.forEach((row, number) => {
        const value = at ? words[at[number]] : values[number];
        if (value !== null) row[name] = value;
      });
    }
    return rows;
  }
  for (const chart of Object.values(data.charts)) {
    chart.rows = unpack(chart.rows);
    chart.notes = unpack(chart.notes);
  }

  const picked = () => {
    const fields = Object.fromEntries(picks.map((pick) => [pick.dataset.field, pick.value]));
    return { ...fields, kind_of_measure: data.measures[fields.measure]?.kind };
  };
  const fits = (row, fields) => Object.entries(fields).every(([name, value]) => !(name in row) || String(row[name]) === value);

  async function drawPanel(panel, chart, name, fields) {
    views.get(panel)?.finalize();
    const rows = chart.rows.filter((row) => fits(row, fields));
    const note = chart.notes.find((one) => fits(one, fields))?.note ?? "";
    const plot = panel.querySelector(".plot");
    panel.querySelector(".note").textContent = (note || (rows.length ? "" : chart.empty)).replaceAll(" %", "\u00a0%");
    plot.hidden = !rows.length;
    plot.replaceChildren();
    if (!rows.length) return;
    const { axis = "", name: kind = "" } = data.measures[fields.measure] ?? {};
    const spec = JSON.parse(JSON.stringify(data.specs[name]), (_, value) =>
      typeof value === "string" ? value.replace("{measure}", axis).replace("{kind}", kind) : value);
    spec.description = [panel.closest("figure").querySelector("h3").textContent, fields.recipe, note].filter(Boolean).join(". ");
    spec.datasets = { rows };
    const bands = spec.usermeta?.bands;
    if (bands) spec.height = BAND * new Set(rows.map((row) => JSON.stringify(bands.map((name) => row[name])))).size;
    spec.autosize = { type: "fit-x", contains: "padding" };
    spec.background = null;
    const config = {
      font: "system-ui, sans-serif",
      axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 150, titleLimit: 340 },
      legend: { labelFontSize: 12, symbolStrokeWidth: 0 },
      view: { stroke: null },
    };
    // Level 1 logs errors only: filters that leave a layer without rows are meant.
    const embedded = await vegaEmbed(plot, spec, { actions: false, renderer: "svg", config, logLevel: 1 });
    views.set(panel, embedded);
  }

  async function drawAll() {
    const fields = picked();
    for (const figure of document.querySelectorAll("figure[data-chart]")) {
      const name = figure.dataset.chart;
      for (const panel of figure.querySelectorAll(".panel")) {
        const recipe = panel.dataset.recipe;
        await drawPanel(panel, data.charts[name], name, recipe === undefined ? fields : { ...fields, recipe });
      }
    }
    document.body.dataset.drawn = document.querySelectorAll(".plot svg").length;
  }

  picks.forEach((pick) => pick.addEventListener("change", drawAll));
  drawAll();
})();
