// SPDX-License-Identifier: Apache-2.0
// The script of the report page: draws what pagecache_bpf/reporting/page.py has put into the page.
// Names of files, tensors and processes are only ever set as text, never as markup.
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const counterNames = data.counters.map((counter) => counter.name);
  // Okabe and Ito's colors, which people with any kind of color vision can tell apart.
  const FOUND = [null,
    { text: "hit", color: [0, 158, 115] },
    { text: "just read ahead by the kernel", color: [86, 180, 233] },
    { text: "prefetched late", color: [230, 159, 0] },
    { text: "missed", color: [213, 94, 0] }];
  const STATE = [
    { text: "not in the cache", color: [255, 255, 255] },
    { text: "resident", color: [150, 150, 150] },
    { text: "prefetched, not used yet", color: [204, 121, 167] },
    { text: "evicted", color: [240, 228, 66] }];
  const LABEL = 96; // pixels for the axis of values, alike in all panels

  const unpack = async (text, Type) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    return Type ? new Type(buffer) : new TextDecoder().decode(buffer);
  };
  const element = (name, text, parent, className) => {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = text;
    if (className) made.className = className;
    if (parent) parent.appendChild(made);
    return made;
  };
  const bytes = (count) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (Math.abs(count) >= 1024 && at < units.length - 1) { count /= 1024; at++; }
    return (at ? count.toFixed(1) : Math.round(count)) + " " + units[at];
  };
  const percent = (part) => (100 * part).toFixed(1) + "%";
  const seconds = (time) => (time < 1 ? (1000 * time).toFixed(1) + " ms" : time.toFixed(2) + " s");
  const css = (color) => `rgb(${color.join(",")})`;
  const visible = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

  // --- what the page holds, unpacked ---
  const prepare = async (load) => {
    load.picture = await unpack(load.picture, Uint8Array);
    load.stalls = await unpack(load.stalls, Float32Array);
    load.window = await unpack(load.window, Int32Array);
    for (const name of Object.keys(load.series)) load.series[name] = await unpack(load.series[name], Float32Array);
    const details = load.details;
    for (const name of ["row", "column", "reader"]) details[name] = await unpack(details[name], Int32Array);
    details.counters = await unpack(details.counters, Float32Array);
    const tensors = load.tensors;
    tensors.names = tensors.count ? (await unpack(tensors.names)).split("\0").map(visible) : [];
    tensors.start = await unpack(tensors.start, Float64Array);
    tensors.bytes = await unpack(tensors.bytes, Float64Array);
    load.seconds = load.columns * load.columnSeconds;
    // The events of each row lie together: from[row] to from[row + 1] of order.
    load.order = Int32Array.from(details.row.keys()).sort((a, b) => details.row[a] - details.row[b] || details.column[a] - details.column[b]);
    load.from = new Int32Array(load.rows + 1);
    for (const row of details.row) load.from[row + 1]++;
    for (let row = 0; row < load.rows; row++) load.from[row + 1] += load.from[row];
    load.image = document.createElement("canvas");
    load.image.width = load.columns;
    load.image.height = load.rows;
    paint(load);
  };
  const paint = (load) => {
    const context = load.image.getContext("2d");
    const pixels = context.createImageData(load.columns, load.rows);
    for (let at = 0; at < load.picture.length; at++) {
      const value = load.picture[at], found = value >> 4, state = value & 3, level = (value >> 2) & 3;
      const color = found ? FOUND[found].color : STATE[state].color;
      const alpha = found ? 255 : state === 0 ? 0 : state === 3 ? 110 : 70 + 45 * level;
      pixels.data.set(color, 4 * at);
      pixels.data[4 * at + 3] = alpha;
    }
    context.putImageData(pixels, 0, 0);
  };
  const counter = (load, event, name) => load.details.counters[counterNames.indexOf(name) * load.details.count + event];
  for (const load of data.loads) await prepare(load);
  const first = data.loads[0];
  const longest = Math.max(...data.loads.map((load) => load.seconds));

  // --- summary ---
  document.getElementById("title").textContent = visible(first.model) + ": " +
    data.loads.map((load) => `${visible(load.label)} (${load.policy ? load.policy + " on " + load.engine : "the kernel's default"})`).join(" against ");
  const summary = document.getElementById("summary");
  for (const load of data.loads) {
    const numbers = load.summary, accessed = numbers.accessed_bytes || 1;
    if (data.loads.length > 1) element("h2", visible(load.label), summary);
    element("p", load.verdict, summary, "verdict");
    const list = element("div", null, summary, "numbers");
    const show = (text, value) => { const one = element("div", null, list); element("b", value, one); element("span", text, one); };
    show("accessed", bytes(numbers.accessed_bytes));
    show("from the first event to the last", seconds(numbers.active_seconds));
    show("hit", percent(numbers.all_hit_bytes / accessed));
    show("just ahead", percent(numbers.ahead_bytes / accessed));
    show("late", percent(numbers.late_bytes / accessed));
    show("missed", percent(numbers.miss_bytes / accessed));
    show("stalled, all readers", seconds(numbers.stall_ns / 1e9));
    show("prefetched", bytes(numbers.prefetched_bytes));
    show("read by the device", bytes(numbers.device_bytes));
    show("of what the device gives", numbers.device_share === null ? "unknown" : percent(numbers.device_share));
    show("evicted: memory short", bytes(numbers.reclaimed_bytes));
    show("dropped by the policy", bytes(numbers.dropped_bytes));
    const notes = [];
    if (load.lost) notes.push(`${load.lost} events were lost for lack of room: the numbers are too low.`);
    const simulated = load.engine === "simulation";
    if (load.uncounted.length && !simulated) notes.push("This kernel cannot count: " + load.uncounted.join(", ") + ".");
    if (simulated) notes.push("A replay of a trace through a model of the page cache, where reading takes no time: there are no stalls.");
    else notes.push(`Linux ${load.kernel}, ${new Date(load.started).toISOString()}` + (load.command ? ": " + visible(load.command) : ""));
    element("p", notes.join(" "), summary, "note");
  }
  const legend = document.getElementById("legend");
  const key = (color, text) => { const one = element("span", null, legend); element("i", null, one).style.background = css(color); one.append(text); };
  for (const one of FOUND.slice(1)) key(one.color, "read: " + one.text);
  for (const one of STATE.slice(1)) key(one.color, one.text);
  if (data.loads.some((load) => load.window.length)) key(STATE[2].color, "between two pink lines: the window");

  // --- panels on one axis of time ---
  const panels = document.getElementById("panels");
  const plots = [];
  const view = { x0: 0, x1: longest, y0: 0, y1: 1 }; // y as a share of all bytes
  let theme = {};
  const readTheme = () => {
    const style = getComputedStyle(document.documentElement);
    theme = { text: style.getPropertyValue("--text"), line: style.getPropertyValue("--line") };
  };
  readTheme();
  const width = () => Math.max(320, panels.clientWidth);
  const axis = (extra) => ({ stroke: () => theme.text, grid: { stroke: () => theme.line, width: 0.5 }, ticks: { stroke: () => theme.line }, ...extra });
  const drawPhases = (plot, load) => {
    const context = plot.ctx;
    context.save();
    context.fillStyle = context.strokeStyle = theme.text;
    context.setLineDash([4, 4]);
    context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const [at, name] of load.phases) {
      if (at < view.x0 || at > view.x1) continue;
      const x = plot.valToPos(at, "x", true);
      context.beginPath();
      context.moveTo(x, plot.bbox.top);
      context.lineTo(x, plot.bbox.top + plot.bbox.height);
      context.stroke();
      context.fillText(visible(name), x + 4, plot.bbox.top + 12 * devicePixelRatio);
    }
    context.restore();
  };
  const panel = (title, height, options, values) => {
    const box = element("div", null, panels, "panel");
    element("h2", title, box);
    const plot = new uPlot({
      width: width(), height, legend: { show: false },
      cursor: { sync: { key: "time" }, drag: { x: true, y: options.map === true, uni: 30, setScale: false }, points: { show: false } },
      ...options,
      scales: { x: { time: false, range: (plot, min, max) => [min, max] }, ...options.scales },
      axes: [axis({ size: 28, values: (plot, splits) => splits.map((split) => +split.toFixed(3) + " s") }), axis({ size: LABEL, ...options.value })],
      hooks: { ...options.hooks, setSelect: [zoomTo] },
    }, values, box);
    plot.isMap = options.map === true;
    plot.load = options.load;
    plot.over.addEventListener("mousedown", () => { dragged = plot; });
    plots.push(plot);
    return plot;
  };
  let dragged = null; // the plot in which a range is selected; the others only follow it
  const zoomTo = (plot) => {
    const select = plot.select;
    if (plot !== dragged) return;
    if (select.width < 4 && select.height < 4) return;
    if (select.width >= 4) {
      view.x0 = Math.max(0, plot.posToVal(select.left, "x"));
      view.x1 = Math.min(longest, plot.posToVal(select.left + select.width, "x"));
    }
    if (plot.isMap && select.height >= 4 && select.height < plot.bbox.height / devicePixelRatio - 1) {
      const total = plot.load.totalBytes;
      const ends = [plot.posToVal(select.top, "y") / total, plot.posToVal(select.top + select.height, "y") / total];
      view.y0 = Math.max(0, Math.min(...ends));
      view.y1 = Math.min(1, Math.max(...ends));
    }
    dragged = null;
    for (const other of plots) other.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    apply();
  };
  let highlight = null; // a tensor that was searched for: [from, to) in bytes
  // The policy's window: from the first byte to the last that was prefetched and is not used yet.
  const drawWindow = (plot, load) => {
    const { left, top, width: w, height: h } = plot.bbox, context = plot.ctx;
    context.save();
    context.beginPath();
    context.rect(left, top, w, h);
    context.clip();
    context.fillStyle = `rgba(${STATE[2].color.join(",")},0.22)`;
    context.strokeStyle = css(STATE[2].color);
    context.lineWidth = devicePixelRatio;
    context.beginPath();
    for (let at = 0; at < load.window.length; at += 3) {
      const x = plot.valToPos(load.window[at] * load.columnSeconds, "x", true);
      const end = plot.valToPos((load.window[at] + 1) * load.columnSeconds, "x", true);
      if (end < left || x > left + w) continue;
      const y = (row) => top + (row / load.rows - view.y0) / (view.y1 - view.y0) * h;
      const from = y(load.window[at + 1]), to = y(load.window[at + 2]);
      context.fillRect(x, from, end - x, to - from);
      context.moveTo(x, from); context.lineTo(end, from);
      context.moveTo(x, to); context.lineTo(end, to);
    }
    context.stroke();
    context.restore();
  };
  const drawMap = (load) => (plot) => {
    const { left, top, width: w, height: h } = plot.bbox, context = plot.ctx;
    context.save();
    context.imageSmoothingEnabled = false;
    const until = Math.min(view.x1, load.seconds), share = (until - view.x0) / (view.x1 - view.x0);
    if (share > 0) {
      context.drawImage(load.image,
        view.x0 / load.seconds * load.columns, view.y0 * load.rows,
        (until - view.x0) / load.seconds * load.columns, (view.y1 - view.y0) * load.rows,
        left, top, w * share, h);
    }
    drawWindow(plot, load);
    context.strokeStyle = theme.text;
    context.lineWidth = 0.5;
    if (load.files.length <= 200) {
      for (const file of load.files.slice(1)) {
        const share = file.base / load.totalBytes;
        if (share <= view.y0 || share >= view.y1) continue;
        const y = top + (share - view.y0) / (view.y1 - view.y0) * h;
        context.beginPath(); context.moveTo(left, y); context.lineTo(left + w, y); context.stroke();
      }
    }
    if (highlight) {
      const at = (place) => top + (place / load.totalBytes - view.y0) / (view.y1 - view.y0) * h;
      context.lineWidth = 2 * devicePixelRatio;
      context.strokeRect(left, at(highlight[0]), w, Math.max(2, at(highlight[1]) - at(highlight[0])));
    }
    context.restore();
    drawPhases(plot, load);
  };
  for (const load of data.loads) {
    panel((data.loads.length > 1 ? visible(load.label) + ": " : "") + "file offset over time", 420, {
      map: true, load,
      scales: { y: { dir: -1, range: (plot, min, max) => [min, max] } },
      value: { values: (plot, splits) => splits.map(bytes) },
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: { draw: [drawMap(load)], setCursor: [(plot) => hovered(plot, load)] },
    }, [[0, longest], [0, load.totalBytes]]);
  }
  const stretched = (load, name, scale) => Array.from(load.series[name] || [], (value) => value * scale);
  const middles = (load) => Array.from({ length: load.columns }, (_, at) => (at + 0.5) * load.columnSeconds);
  const lines = (title, unit, names) => {
    const tables = [], series = [{}];
    for (const [index, load] of data.loads.entries()) {
      const columns = [middles(load)];
      for (const [name, text, color, scale] of names(load)) {
        if (!load.series[name]) continue;
        columns.push(stretched(load, name, scale));
        series.push({ label: text, stroke: css(color), width: 1.5, dash: index ? [6, 4] : undefined, points: { show: false } });
      }
      tables.push(columns);
    }
    const limit = first.limit;
    return panel(title, 170, {
      series, scales: { y: { range: (plot, min, max) => [0, Math.max(max, 1e-9) * 1.05] } },
      value: { values: (plot, splits) => splits.map((split) => unit(split)) },
      hooks: { draw: [(plot) => { drawPhases(plot, first); if (title.includes("device") && limit) drawLimit(plot, limit); }] },
    }, tables.length > 1 ? uPlot.join(tables) : tables[0]);
  };
  const drawLimit = (plot, limit) => {
    const y = plot.valToPos(limit, "y", true), context = plot.ctx;
    if (y < plot.bbox.top) return;
    context.save();
    context.strokeStyle = context.fillStyle = theme.text;
    context.setLineDash([2, 4]);
    context.beginPath(); context.moveTo(plot.bbox.left, y); context.lineTo(plot.bbox.left + plot.bbox.width, y); context.stroke();
    context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    context.fillText("limit of the device", plot.bbox.left + 6, y - 4);
    context.restore();
  };
  const rate = (load) => 1 / load.columnSeconds;
  lines("throughput: device (dark), accessed as hit, ahead, late, missed; dashed: the second load", (value) => bytes(value) + "/s", (load) => [
    ["device", "device", [90, 90, 110], rate(load)],
    ["hit", "hit", FOUND[1].color, rate(load)], ["ahead", "ahead", FOUND[2].color, rate(load)],
    ["late", "late", FOUND[3].color, rate(load)], ["miss", "missed", FOUND[4].color, rate(load)]]);
  lines("memory: resident (dark), prefetched and not used yet, headroom of the reader's cgroup", bytes, (load) => [
    ["resident", "resident", [90, 90, 110], 1], ["unused", "prefetched, not used yet", STATE[2].color, 1],
    ["headroom", "headroom", [0, 114, 178], 1]]);
  for (const load of data.loads) {
    const count = Math.max(1, load.readers.length);
    panel((data.loads.length > 1 ? visible(load.label) + ": " : "") + "stalls, one lane a reader (darker: slept for more of the time)", Math.min(300, 50 + 22 * count), {
      load, scales: { y: { dir: -1, range: () => [0, count] } },
      value: { splits: () => load.readers.map((_, at) => at + 0.5), values: () => load.readers.map((reader) => visible(reader.name).slice(0, 9) + " " + reader.tgid), font: "11px system-ui" },
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: { draw: [(plot) => {
        const { left, top, width: w, height: h } = plot.bbox, context = plot.ctx;
        context.save();
        context.beginPath(); context.rect(left, top, w, h); context.clip();
        for (let lane = 0; lane < count; lane++) {
          for (let column = 0; column < load.columns; column++) {
            const share = Math.min(1, load.stalls[lane * load.columns + column] / load.columnSeconds);
            if (!share) continue;
            const x = plot.valToPos(column * load.columnSeconds, "x", true), end = plot.valToPos((column + 1) * load.columnSeconds, "x", true);
            context.fillStyle = `rgba(${FOUND[4].color.join(",")},${0.15 + 0.85 * share})`;
            context.fillRect(x, top + lane / count * h + 1, Math.max(1, end - x), h / count - 2);
          }
        }
        context.restore();
        drawPhases(plot, load);
      }] },
    }, [[0, longest], [0, count]]);
  }
  const apply = () => {
    const begun = performance.now();
    for (const plot of plots) {
      plot.batch(() => {
        plot.setScale("x", { min: view.x0, max: view.x1 });
        if (plot.isMap) plot.setScale("y", { min: view.y0 * plot.load.totalBytes, max: view.y1 * plot.load.totalBytes });
      });
    }
    const drawn = performance.now() - begun;
    fillTables();
    return drawn;
  };

  // --- what lies where ---
  const fileAt = (load, place) => {
    let low = 0, high = load.files.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (load.files[middle].base <= place) low = middle; else high = middle - 1; }
    return load.files[low];
  };
  const tensorsIn = (load, from, to) => {
    const { start, bytes: lengths, count } = load.tensors;
    let low = 0, high = count;
    while (low < high) { const middle = (low + high) >> 1; if (start[middle] + lengths[middle] <= from) low = middle + 1; else high = middle; }
    const found = [];
    for (let at = low; at < count && start[at] < to; at++) found.push(at);
    return found;
  };
  const rowRange = (load, row) => [row * load.totalBytes / load.rows, (row + 1) * load.totalBytes / load.rows];
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
    for (const [name, what] of [["prefetched_bytes", "prefetched"], ["read_bytes", "read in"], ["useful_bytes", "used in time"], ["hit_bytes", "hit"], ["ahead_bytes", "used, just read ahead"], ["late_bytes", "used late"], ["miss_bytes", "missed"], ["reclaimed_bytes", "reclaimed"], ["dropped_bytes", "dropped"], ["discarded_bytes", "discarded"]]) {
      let sum = 0, when = null;
      for (let at = load.from[row]; at < load.from[row + 1]; at++) {
        const amount = counter(load, load.order[at], name);
        if (amount) { sum += amount; when ??= load.details.column[load.order[at]] * load.columnSeconds; }
      }
      if (sum) happened.push(`${what} ${bytes(sum)} from ${seconds(when)}`);
    }
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

  // --- the worst of what is shown ---
  const inView = (load) => {
    const rows = new Map(), readers = new Map();
    const low = Math.floor(view.x0 / load.columnSeconds), high = Math.ceil(view.x1 / load.columnSeconds);
    const top = Math.floor(view.y0 * load.rows), bottom = Math.ceil(view.y1 * load.rows);
    for (let at = load.from[top]; at < load.from[Math.min(load.rows, bottom)]; at++) {
      const event = load.order[at], column = load.details.column[event];
      if (column < low || column >= high) continue;
      const sums = [counter(load, event, "stall_ns") / 1e9,
        counter(load, event, "miss_bytes") + counter(load, event, "late_bytes"),
        counter(load, event, "hit_bytes") + counter(load, event, "useful_bytes") + counter(load, event, "ahead_bytes") + counter(load, event, "late_bytes") + counter(load, event, "miss_bytes")];
      for (const [table, index] of [[rows, load.details.row[event]], [readers, load.details.reader[event]]]) {
        if (index < 0) continue;
        const known = table.get(index) || [0, 0, 0];
        table.set(index, known.map((sum, place) => sum + sums[place]));
      }
    }
    return { rows, readers };
  };
  const worst = (load) => {
    const { rows, readers } = inView(load), tensors = new Map();
    for (const [row, sums] of rows) {
      const [from, to] = rowRange(load, row);
      for (const at of tensorsIn(load, from, to)) {
        const { start, bytes: lengths } = load.tensors;
        const share = (Math.min(to, start[at] + lengths[at]) - Math.max(from, start[at])) / (to - from);
        const known = tensors.get(at) || [0, 0, 0];
        tensors.set(at, known.map((sum, place) => sum + share * sums[place]));
      }
    }
    const order = (table) => [...table].sort((a, b) => b[1][0] - a[1][0] || b[1][1] - a[1][1] || b[1][2] - a[1][2]).slice(0, 12);
    return {
      tensors: order(tensors).map(([at, sums]) => [load.tensors.names[at], ...sums]),
      readers: order(readers).map(([at, sums]) => [`${visible(load.readers[at].name)} (${load.readers[at].tgid})`, ...sums]),
    };
  };
  const tables = document.getElementById("tables");
  const fillTables = () => {
    tables.textContent = "";
    for (const load of data.loads) {
      const found = worst(load), label = data.loads.length > 1 ? visible(load.label) + ": " : "";
      for (const [title, rows] of [["tensors", found.tensors], ["readers", found.readers]]) {
        if (!rows.length) continue;
        const table = element("table", null, tables);
        element("caption", `${label}${title} that waited longest, ${seconds(view.x0)} to ${seconds(view.x1)}` + (title === "tensors" ? `, to the precision of ${bytes(load.totalBytes / load.rows)}` : ""), table);
        const head = element("tr", null, element("thead", null, table));
        for (const text of [title.slice(0, -1), "stalled", "missed or late", "accessed"]) element("th", text, head);
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
  };

  // --- search, keys, theme, size ---
  const search = document.getElementById("search"), found = document.getElementById("found");
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    found.textContent = "";
    highlight = null;
    if (wanted) {
      let shown = 0;
      for (let at = 0; at < first.tensors.count && shown < 20; at++) {
        const name = first.tensors.names[at];
        if (!name.toLowerCase().includes(wanted)) continue;
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
  const reset = () => { Object.assign(view, { x0: 0, x1: longest, y0: 0, y1: 1 }); apply(); };
  document.getElementById("reset").addEventListener("click", reset);
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.classList.contains("dark") || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
    root.classList.toggle("dark", !dark);
    root.classList.toggle("light", dark);
    readTheme();
    apply();
  });
  const move = (low, high, step, factor, limit) => {
    const size = (high - low) * factor, middle = (low + high) / 2 + step * (high - low);
    const from = Math.min(Math.max(0, middle - size / 2), Math.max(0, limit - size));
    return [from, Math.min(limit, from + size)];
  };
  document.addEventListener("keydown", (event) => {
    if (event.target === search) { if (event.key === "Escape") search.blur(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const across = { ArrowLeft: [-0.2, 1], ArrowRight: [0.2, 1], "+": [0, 0.5], "=": [0, 0.5], "-": [0, 2] }[event.key];
    const down = { ArrowUp: -0.2, ArrowDown: 0.2 }[event.key];
    if (event.key === "0") reset();
    else if (event.key === "/") { event.preventDefault(); search.focus(); }
    else if (across) { [view.x0, view.x1] = move(view.x0, view.x1, ...across, longest); apply(); }
    else if (down && view.y1 - view.y0 < 1) { event.preventDefault(); [view.y0, view.y1] = move(view.y0, view.y1, down, 1, 1); apply(); }
  });
  addEventListener("resize", () => { for (const plot of plots) plot.setSize({ width: width(), height: plot.height }); apply(); });
  apply();
  // For tests, and for whoever wants a number in the console.
  window.report = { data, view, plots, describe, worst, apply, reset };
  document.documentElement.dataset.ready = "yes";
})();
