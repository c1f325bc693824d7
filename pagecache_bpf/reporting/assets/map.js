// SPDX-License-Identifier: Apache-2.0
// Fourth part of the report page's script: the map of file offset over time, drawn over cells that Python has quantized.
let highlight = null; // a tensor that was searched for: [from, to) in bytes
/**
 * Paint the visible rows at no more than the screen's height.  Of rows that share a line of the
 * screen the worst read is shown, and a read is at least three lines high: none is too thin to see.
 */
const paint = (load, height) => {
  const top = Math.floor(view.y0 * load.rows), bottom = Math.max(top + 1, Math.ceil(view.y1 * load.rows));
  const lines = Math.min(bottom - top, Math.max(1, Math.round(height))), { columns, picture } = load;
  load.image ??= document.createElement("canvas");
  load.image.width = columns;
  load.image.height = lines;
  const context = load.image.getContext("2d"), pixels = context.createImageData(columns, lines);
  const out = new Uint32Array(pixels.data.buffer), reads = new Uint8Array(columns * lines);
  const color = (rgb, alpha) => (alpha << 24 | rgb[2] << 16 | rgb[1] << 8 | rgb[0]) >>> 0;
  const shown = Array.from({ length: 16 }, (_, value) => {
    const state = value & 3;
    return state ? color(STATE[state].color, state === EVICTED ? 130 : 70 + 45 * (value >> 2)) : 0;
  });
  const found = FOUND.map((one) => (one ? color(one.color, 255) : 0));
  for (let row = top; row < bottom; row++) {
    const line = Math.min(lines - 1, Math.floor((row - top) * lines / (bottom - top)));
    for (let column = 0, from = row * columns, to = line * columns; column < columns; column++, from++, to++) {
      const value = picture[from];
      if (value >> 4 > reads[to]) reads[to] = value >> 4;
      const behind = shown[value & 15];
      if (behind > out[to]) out[to] = behind;
    }
  }
  let cells = 0;
  const thick = lines > 100 ? 1 : 0;
  for (let at = 0; at < reads.length; at++) {
    if (!reads[at]) continue;
    cells++;
    for (let near = at - thick * columns; near <= at + thick * columns; near += columns) {
      if (near >= 0 && near < out.length && (near === at || !reads[near])) out[near] = found[reads[at]];
    }
  }
  context.putImageData(pixels, 0, 0);
  drawn.reads = cells;
  return [top, bottom];
};
const screenOf = (load, top, h) => (row) => top + (row / load.rows - view.y0) / (view.y1 - view.y0) * h;
// The policy's window: from the first byte to the last that was prefetched and is not used yet.
const drawWindow = (plot, load) => clipped(plot, (context, left, top, w, h) => {
  const y = screenOf(load, top, h);
  context.fillStyle = css(STATE[2].color, 0.22);
  context.strokeStyle = css(STATE[2].color);
  context.lineWidth = dpr();
  context.beginPath();
  drawn.window = 0;
  for (let at = 0; at < load.window.length; at += 3) {
    const x = plot.valToPos(load.window[at] * load.columnSeconds, "x", true);
    const end = plot.valToPos((load.window[at] + 1) * load.columnSeconds, "x", true);
    if (end < left || x > left + w) continue;
    const from = y(load.window[at + 1]), to = y(load.window[at + 2]);
    drawn.window++;
    context.fillRect(x, from, end - x, to - from);
    context.moveTo(x, from); context.lineTo(end, from);
    context.moveTo(x, to); context.lineTo(end, to);
  }
  context.stroke();
});
/** Where the template expects the readers: a line through the cells, broken where the order jumps. */
const drawTemplate = (plot, load) => clipped(plot, (context, left, top, w, h) => {
  const cells = load.template.cells, y = screenOf(load, top, h), jump = Math.max(2, load.rows * 0.02);
  drawn.template = 0;
  const path = new Path2D();
  let before = null;
  for (let at = 0; at < cells.length; at += 2) {
    const column = cells[at], row = cells[at + 1];
    const x = plot.valToPos((column + 0.5) * load.columnSeconds, "x", true), to = y(row + 0.5);
    const joined = before && Math.abs(row - before[1]) <= jump && column - before[0] <= 3 && column >= before[0];
    before = [column, row];
    if (!joined) path.moveTo(x - 1.5 * dpr(), to);
    path.lineTo(joined ? x : x + 1.5 * dpr(), to);
    if (x >= left && x <= left + w && to >= top && to <= top + h) drawn.template++;
  }
  context.strokeStyle = theme.text;
  context.lineWidth = 1.3 * dpr();
  context.setLineDash([4 * dpr(), 4 * dpr()]); // the reads have to be seen between
  context.stroke(path);
});
/** Where tensors begin, on the axis; never more than one tick for two pixels of the screen. */
const drawTensors = (plot, load) => {
  const { left, top, width: w, height: h } = plot.bbox, context = plot.ctx, total = load.totalBytes;
  const from = view.y0 * total, to = view.y1 * total, step = 2 * dpr() * (to - from) / h;
  const y = (place) => top + (place - from) / (to - from) * h;
  const { start, bytes: lengths, count, names } = load.tensors;
  context.save();
  context.strokeStyle = theme.text;
  context.lineWidth = 0.7 * dpr();
  context.beginPath();
  drawn.ticks = 0;
  for (let place = from; place < to;) {
    const at = tensorBehind(load, place);
    if (at >= count || start[at] >= to) break;
    if (start[at] >= from) {
      context.moveTo(left - 7 * dpr(), y(start[at]));
      context.lineTo(left - dpr(), y(start[at]));
      drawn.ticks++;
    }
    place = Math.max(start[at] + lengths[at], place + step);
  }
  context.stroke();
  context.font = font(10);
  drawn.names = 0;
  for (let at = tensorBehind(load, from), end = -Infinity; at < count && start[at] < to && drawn.names < 60; at++) {
    const low = y(Math.max(from, start[at])), high = y(Math.min(to, start[at] + lengths[at]));
    if (high - low < 12 * dpr() || low < end) {
      if (at - tensorBehind(load, from) > 2000) break; // far too many to be named
      continue;
    }
    label(context, names[at].slice(-70), left + w - 5 * dpr(), (low + high) / 2 + 3.5 * dpr(), "right");
    drawn.names++;
    end = high;
  }
  context.restore();
};
const drawFiles = (plot, load) => clipped(plot, (context, left, top, w, h) => {
  const total = load.totalBytes, y = (place) => top + (place / total - view.y0) / (view.y1 - view.y0) * h;
  if (load.files.length > 200) return;
  context.font = font(10, "600");
  for (const file of load.files) {
    const from = y(file.base), to = y(file.base + file.bytes);
    if (to < top || from > top + h) continue;
    if (file !== load.files[0]) {
      context.setLineDash([]);
      context.strokeStyle = theme.text;
      context.lineWidth = 0.7 * dpr();
      context.beginPath(); context.moveTo(left, from); context.lineTo(left + w, from); context.stroke();
    }
    if (Math.min(to, top + h) - Math.max(from, top) > 16 * dpr()) label(context, base(file.path).slice(0, 60), left + 5 * dpr(), Math.min(to, top + h) - 5 * dpr());
  }
});
const drawMap = (load) => (plot) => {
  clipped(plot, (context, left, top, w, h) => {
    const until = Math.min(view.x1, load.seconds), share = (until - view.x0) / (view.x1 - view.x0);
    const [low, high] = paint(load, h), y = screenOf(load, top, h);
    context.imageSmoothingEnabled = false;
    if (share > 0) {
      context.drawImage(load.image,
        view.x0 / load.seconds * load.columns, 0, (until - view.x0) / load.seconds * load.columns, load.image.height,
        left, y(low), w * share, y(high) - y(low));
    }
  });
  drawWindow(plot, load);
  if (load.template) drawTemplate(plot, load);
  drawFiles(plot, load);
  drawTensors(plot, load);
  if (highlight && load === first) clipped(plot, (context, left, top, w, h) => {
    const y = (place) => top + (place / load.totalBytes - view.y0) / (view.y1 - view.y0) * h;
    context.strokeStyle = theme.text;
    context.lineWidth = 2 * dpr();
    context.strokeRect(left, y(highlight[0]), w, Math.max(2, y(highlight[1]) - y(highlight[0])));
  });
  drawPhases(plot, load, true);
};
for (const load of data.loads) {
  const keys = [
    ...FOUND.slice(1).map((one) => [css(one.color), "read: " + one.text]),
    ...STATE.slice(1).map((one) => [css(one.color), one.text])];
  if (load.window.length) keys.push([css(STATE[2].color), "between two such lines: the policy's window", "band"]);
  if (load.template) keys.push(["var(--text)", "where the template expects the reader", "dashes"]);
  if (load.tensors.count) keys.push(["var(--text)", "a tick at the axis: a tensor begins", "tick"]);
  if (load.phases.length) keys.push(["var(--text)", "upright: a phase begins", "dashes"]);
  panel(named(load) + "offset in the files, one below the other, over time", keys, 440, {
    map: true, load,
    scales: { y: { dir: -1, range: (plot, min, max) => [min, max] } },
    value: { values: (plot, splits) => splits.map(round), incrs: POWERS, ticks: { show: false }, gap: 12 },
    series: [{}, { paths: () => null, points: { show: false } }],
    hooks: { draw: [drawMap(load)], setCursor: [(plot) => hovered(plot, load)] },
  }, [[0, longest], [0, load.totalBytes]]);
}
