// SPDX-License-Identifier: Apache-2.0
// Sixth part of the report page's script: what happened under the pointer, and the worst of what is shown.
const HISTORY = [["prefetched_bytes", "prefetched"], ["read_bytes", "read in"], ["useful_bytes", "used in time"], ["hit_bytes", "hit"], ["ahead_bytes", "used, just ahead"], ["late_bytes", "used late"], ["miss_bytes", "missed"], ["reclaimed_bytes", "evicted: memory short"], ["dropped_bytes", "dropped by the policy"], ["discarded_bytes", "dropped by a program"]];
const describe = (load, time, place) => {
  const row = Math.min(load.rows - 1, Math.max(0, Math.floor(place / load.totalBytes * load.rows)));
  const column = Math.min(load.columns - 1, Math.max(0, Math.floor(time / load.columnSeconds)));
  const [from, to] = rowRange(load, row), file = fileAt(load, from);
  const value = load.picture[row * load.columns + column];
  const text = [`${seconds(time)}  ${visible(file.path)}  ${bytes(from - file.base)} to ${bytes(to - file.base)}  ` +
    (value >> 4 ? "read: " + FOUND[value >> 4].text : STATE[value & 3].text)];
  const inside = tensorsIn(load, from, to);
  if (inside.length) text.push("tensors: " + inside.slice(0, 6).map((at) => load.tensors.names[at]).join(", ") + (inside.length > 6 ? `, and ${inside.length - 6} more` : ""));
  const happened = [];
  for (const [name, what] of HISTORY) {
    let sum = 0, when = null;
    for (let at = load.from[row]; at < load.from[row + 1]; at++) {
      const amount = counter(load, load.order[at], name);
      if (amount) { sum += amount; when ??= load.details.column[load.order[at]] * load.columnSeconds; }
    }
    if (sum) happened.push(`${what} ${bytes(sum)} from ${seconds(when)}`);
  }
  if (load.template && load.template.place[row] >= 0) happened.push(`in the template after ${bytes(load.template.place[row])}`);
  if (happened.length) text.push(happened.join("; "));
  const here = [];
  for (let at = load.from[row]; at < load.from[row + 1]; at++) {
    const event = load.order[at];
    if (load.details.column[event] !== column || load.details.reader[event] < 0) continue;
    const reader = load.readers[load.details.reader[event]], stall = counter(load, event, "stall_ns");
    here.push(`${visible(reader.name)} (${reader.tgid})` + (stall ? ` slept ${seconds(stall / 1e9)}` : ""));
  }
  if (here.length) text.push("readers here: " + here.join(", "));
  return text.join("\n");
};
const hover = document.getElementById("hover");
const hovered = (plot, load) => {
  const { left, top } = plot.cursor;
  if (left === null || left < 0 || top < 0) return;
  hover.textContent = describe(load, plot.posToVal(left, "x"), plot.posToVal(top, "y"));
};

const READ = ["hit_bytes", "useful_bytes", "ahead_bytes", "late_bytes", "miss_bytes"];
/** Stalls, missed or late bytes and accessed bytes of what is shown: three numbers a row, and a reader. */
const inView = (load) => {
  const rows = new Float64Array(3 * load.rows), readers = new Float64Array(3 * load.readers.length);
  const low = Math.floor(view.x0 / load.columnSeconds + 1e-9), high = Math.ceil(view.x1 / load.columnSeconds - 1e-9);
  const top = Math.floor(view.y0 * load.rows + 1e-9), bottom = Math.min(load.rows, Math.ceil(view.y1 * load.rows - 1e-9));
  for (let at = load.from[top]; at < load.from[bottom]; at++) {
    const event = load.order[at], column = load.details.column[event], reader = load.details.reader[event];
    if (column < low || column >= high) continue;
    const sums = [counter(load, event, "stall_ns") / 1e9,
      counter(load, event, "miss_bytes") + counter(load, event, "late_bytes"),
      READ.reduce((sum, name) => sum + counter(load, event, name), 0)];
    for (let place = 0; place < 3; place++) {
      rows[3 * load.details.row[event] + place] += sums[place];
      if (reader >= 0) readers[3 * reader + place] += sums[place];
    }
  }
  return { rows, readers };
};
const worst = (load) => {
  const { rows, readers } = inView(load), { start, bytes: lengths, count } = load.tensors;
  const tensors = new Float64Array(3 * count);
  for (let row = 0; row < load.rows; row++) {
    if (!rows[3 * row] && !rows[3 * row + 2]) continue;
    const [from, to] = rowRange(load, row);
    for (let at = tensorBehind(load, from); at < count && start[at] < to; at++) {
      const share = (Math.min(to, start[at] + lengths[at]) - Math.max(from, start[at])) / (to - from);
      for (let place = 0; place < 3; place++) tensors[3 * at + place] += share * rows[3 * row + place];
    }
  }
  const order = (sums) => {
    const known = [];
    for (let at = 0; at < sums.length; at += 3) if (sums[at] || sums[at + 2]) known.push(at);
    known.sort((a, b) => sums[b] - sums[a] || sums[b + 1] - sums[a + 1] || sums[b + 2] - sums[a + 2] || a - b);
    return known.slice(0, 12).map((at) => [at / 3, sums[at], sums[at + 1], sums[at + 2]]);
  };
  return {
    tensors: order(tensors).map(([at, ...sums]) => [load.tensors.names[at], ...sums]),
    readers: order(readers).map(([at, ...sums]) => [`${visible(load.readers[at].name)} (${load.readers[at].tgid})`, ...sums]),
  };
};
const tables = document.getElementById("tables");
const fillTables = () => {
  tables.textContent = "";
  for (const load of data.loads) {
    const found = worst(load);
    for (const [title, rows] of [["tensors", found.tensors], ["readers", found.readers]]) {
      if (!rows.length) continue;
      const table = element("table", null, tables);
      element("caption", `${named(load)}${title} that waited longest between ${seconds(view.x0)} and ${seconds(view.x1)}` + (title === "tensors" ? `, to the precision of ${bytes(load.totalBytes / load.rows)}` : ""), table);
      const head = element("tr", null, element("thead", null, table));
      for (const text of [title.slice(0, -1), "waited for I/O", "missed or late", "read"]) element("th", text, head);
      const body = element("tbody", null, table);
      for (const [name, stall, bad, accessed] of rows) {
        const line = element("tr", null, body);
        element("td", name, line);
        element("td", seconds(stall), line);
        element("td", bytes(bad), line);
        element("td", bytes(accessed), line);
      }
    }
  }
  document.documentElement.dataset.tables = `${view.x0} ${view.x1} ${view.y0} ${view.y1}`;
};
