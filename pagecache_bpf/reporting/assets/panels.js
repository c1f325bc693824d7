// SPDX-License-Identifier: Apache-2.0
// Third part of the report page's script: panels on one axis of time; uPlot draws axes, lines and the cursor.
const LABEL = 110; // pixels for the axis of values, alike in all panels
const PRINTED = 1000; // the width of a panel on paper
const panels = document.getElementById("panels");
const plots = [];
const view = { x0: 0, x1: longest, y0: 0, y1: 1 }; // y as a share of all bytes
const drawn = {}; // how many things of each kind the last drawing has put on the map
let theme = {}, printing = false;
const readTheme = () => {
  const style = getComputedStyle(document.documentElement);
  theme = { text: style.getPropertyValue("--text").trim(), line: style.getPropertyValue("--line").trim(), ground: style.getPropertyValue("--ground").trim() };
};
readTheme();
const width = () => (printing ? PRINTED : Math.max(320, panels.clientWidth));
const dpr = () => devicePixelRatio;
const font = (size, weight) => `${weight || ""} ${size * dpr()}px system-ui, sans-serif`.trim();
const axis = (extra) => ({ stroke: () => theme.text, grid: { stroke: () => theme.line, width: 0.5 }, ticks: { stroke: () => theme.line }, ...extra });
/** Draw text on a ground of its own, so that it can be read over anything. */
const label = (context, text, x, y, align) => {
  context.textAlign = align || "left";
  context.textBaseline = "alphabetic";
  context.lineWidth = 3 * dpr();
  context.setLineDash([]);
  context.strokeStyle = theme.ground;
  context.lineJoin = "round";
  context.strokeText(text, x, y);
  context.fillStyle = theme.text;
  context.fillText(text, x, y);
};
const clipped = (plot, draw) => {
  const context = plot.ctx, { left, top, width: w, height: h } = plot.bbox;
  context.save();
  context.beginPath();
  context.rect(left, top, w, h);
  context.clip();
  draw(context, left, top, w, h);
  context.restore();
};
/** Phases across a panel, as dashed lines; their names where there is room for them. */
const drawPhases = (plot, load, names) => clipped(plot, (context, left, top) => {
  context.font = font(11);
  const ends = [-Infinity, -Infinity, -Infinity]; // where the names of each line of text end
  for (const [at, name] of load.phases) {
    if (at < view.x0 || at > view.x1) continue;
    const x = plot.valToPos(at, "x", true), text = visible(name);
    context.strokeStyle = theme.text;
    context.lineWidth = dpr();
    context.setLineDash([4 * dpr(), 4 * dpr()]);
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, top + plot.bbox.height);
    context.stroke();
    const line = names ? ends.findIndex((end) => end < x) : -1;
    if (line < 0) continue;
    label(context, text, x + 4 * dpr(), top + (13 + 13 * line) * dpr());
    ends[line] = x + 8 * dpr() + context.measureText(text).width;
  }
});
let dragged = null; // the plot in which a range is selected; the others only follow it
const zoomTo = (plot) => {
  const select = plot.select;
  if (plot !== dragged) return;
  if (select.width < 4 && select.height < 4) return;
  if (select.width >= 4) {
    view.x0 = Math.max(0, plot.posToVal(select.left, "x"));
    view.x1 = Math.min(longest, plot.posToVal(select.left + select.width, "x"));
  }
  if (plot.isMap && select.height >= 4 && select.height < plot.bbox.height / dpr() - 1) {
    const total = plot.load.totalBytes;
    const ends = [plot.posToVal(select.top, "y") / total, plot.posToVal(select.top + select.height, "y") / total];
    view.y0 = Math.max(0, Math.min(...ends));
    view.y1 = Math.min(1, Math.max(...ends));
  }
  dragged = null;
  for (const other of plots) other.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  apply();
};
/** A panel: a heading, a key of its colors, and a plot. */
const panel = (title, keys, height, options, values) => {
  const box = element("div", null, panels, "panel");
  element("h2", title, box);
  const list = element("div", null, box, "keys");
  for (const [color, text, kind] of keys) {
    const one = element("span", null, list), swatch = element("i", null, one, kind);
    swatch.style.setProperty("--color", color);
    one.append(text);
  }
  const plot = new uPlot({
    width: width(), height, legend: { show: false }, padding: [8, 22, 0, 0],
    cursor: { sync: { key: "time" }, drag: { x: true, y: options.map === true, uni: 30, setScale: false }, points: { show: false } },
    ...options,
    scales: { x: { time: false, range: (plot, min, max) => [min, max] }, ...options.scales },
    axes: [axis({ size: 28, values: (plot, splits) => splits.map((split) => +split.toFixed(4) + " s") }), axis({ size: LABEL, ...options.value })],
    hooks: { ...options.hooks, setSelect: [zoomTo] },
  }, values, box);
  plot.isMap = options.map === true;
  plot.load = options.load;
  plot.over.addEventListener("mousedown", () => { dragged = plot; });
  plots.push(plot);
  return plot;
};
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power); // bytes are counted in powers of two
