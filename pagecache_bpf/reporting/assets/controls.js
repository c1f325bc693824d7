// SPDX-License-Identifier: Apache-2.0
// Last part of the report page's script: what changes the view - search, keys, theme, size, paper.
let tablesLater = 0;
/** Draw everything for the present view; the tables follow once it stays as it is for a moment. */
const apply = () => {
  for (const plot of plots) {
    plot.batch(() => {
      plot.setScale("x", { min: view.x0, max: view.x1 });
      if (plot.isMap) plot.setScale("y", { min: view.y0 * plot.load.totalBytes, max: view.y1 * plot.load.totalBytes });
    });
  }
  clearTimeout(tablesLater);
  tablesLater = setTimeout(fillTables, 150);
};
const search = document.getElementById("search"), found = document.getElementById("found");
const lowered = () => (first.tensors.lowered ??= first.tensors.names.map((name) => name.toLowerCase()));
search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  found.textContent = "";
  highlight = null;
  if (wanted) {
    let shown = 0;
    for (let at = 0; at < first.tensors.count && shown < 20; at++) {
      if (!lowered()[at].includes(wanted)) continue;
      const name = first.tensors.names[at];
      element("option", null, found).value = name;
      if (!shown++ || name === search.value) {
        highlight = [first.tensors.start[at], first.tensors.start[at] + first.tensors.bytes[at]];
        hover.textContent = `${name}: ${bytes(first.tensors.bytes[at])}\n` + describe(first, view.x0, highlight[0]);
      }
    }
    if (!shown) hover.textContent = `no tensor has ${visible(search.value)} in its name`;
  }
  apply();
});
/** Show a tensor with as much again above and below it. */
const zoomToTensor = () => {
  if (!highlight) return;
  const [from, to] = highlight.map((place) => place / first.totalBytes), size = Math.max(to - from, 2 / first.rows);
  view.y0 = Math.max(0, from - size);
  view.y1 = Math.min(1, to + size);
  apply();
};
const reset = () => { Object.assign(view, { x0: 0, x1: longest, y0: 0, y1: 1 }); apply(); };
document.getElementById("reset").addEventListener("click", reset);
document.getElementById("print").addEventListener("click", () => print());
const dark = () => {
  const root = document.documentElement;
  return root.classList.contains("dark") || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
};
document.getElementById("theme").addEventListener("click", () => {
  const was = dark();
  document.documentElement.classList.toggle("dark", !was);
  document.documentElement.classList.toggle("light", was);
  readTheme();
  apply();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); apply(); });
const move = (low, high, step, factor, limit) => {
  const size = (high - low) * factor, middle = (low + high) / 2 + step * (high - low);
  const from = Math.min(Math.max(0, middle - size / 2), Math.max(0, limit - size));
  return [from, Math.min(limit, from + size)];
};
const ACROSS = { ArrowLeft: [-0.2, 1], ArrowRight: [0.2, 1], "+": [0, 0.5], "=": [0, 0.5], "-": [0, 2] };
const DOWN = { ArrowUp: [-0.2, 1], ArrowDown: [0.2, 1], "]": [0, 0.5], "[": [0, 2] };
document.addEventListener("keydown", (event) => {
  if (event.target === search) {
    if (event.key === "Escape") search.blur();
    if (event.key === "Enter") zoomToTensor();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const across = ACROSS[event.key], down = DOWN[event.key];
  const whole = view.y0 === 0 && view.y1 === 1; // then the arrows scroll the page, as they do everywhere
  if (event.key === "0") reset();
  else if (event.key === "/") { event.preventDefault(); search.focus(); }
  else if (across) { [view.x0, view.x1] = move(view.x0, view.x1, ...across, longest); apply(); }
  else if (down && (!whole || down[1] < 1)) { event.preventDefault(); [view.y0, view.y1] = move(view.y0, view.y1, ...down, 1); apply(); }
});
const resize = () => { for (const plot of plots) plot.setSize({ width: width(), height: plot.height }); apply(); };
addEventListener("resize", resize);
// On paper: dark on light, as wide as a page, with the tables of what is shown.
let darkBefore = false;
addEventListener("beforeprint", () => {
  darkBefore = document.documentElement.classList.contains("dark");
  printing = true;
  document.documentElement.classList.remove("dark");
  document.documentElement.classList.add("printing");
  readTheme();
  resize();
  fillTables();
});
addEventListener("afterprint", () => {
  printing = false;
  document.documentElement.classList.remove("printing");
  document.documentElement.classList.toggle("dark", darkBefore);
  readTheme();
  resize();
});
apply();
fillTables();
// For tests, and for whoever wants a number in the console.
window.report = { data, view, plots, drawn, describe, worst, phasesOf, apply, reset };
document.documentElement.dataset.ready = "yes";
