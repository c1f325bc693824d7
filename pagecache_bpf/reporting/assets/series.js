// SPDX-License-Identifier: Apache-2.0
// Fifth part of the report page's script: throughput, memory, and a lane for each reader.
const middles = (load) => Array.from({ length: load.columns }, (_, at) => (at + 0.5) * load.columnSeconds);
const lines = (title, unit, names, options) => {
  const tables = [], series = [{}], keys = [], shown = new Set();
  for (const [index, load] of data.loads.entries()) {
    const columns = [middles(load)];
    for (const [name, text, color, scale] of names) {
      if (!load.series[name]) continue;
      columns.push(Array.from(load.series[name], (value) => value * (scale ? scale(load) : 1)));
      series.push({ label: text, stroke: css(color), width: 1.5, dash: index ? [6, 4] : undefined, points: { show: false } });
      if (!shown.has(text)) keys.push([css(color), text, "line"]);
      shown.add(text);
    }
    tables.push(columns);
  }
  if (several) keys.push(["var(--text)", visible(data.loads[1].label), "dashes"]);
  const limit = options.limit;
  if (limit) keys.push(["var(--text)", options.limitText, "dots"]);
  return panel(title, keys, 170, {
    series, scales: { y: { range: (plot, min, max) => [0, Math.max(max, 1e-9, limit || 0) * 1.08] } },
    value: { values: (plot, splits) => splits.map((split) => unit(split)), incrs: POWERS },
    hooks: { draw: [(plot) => { drawPhases(plot, first, false); if (limit) drawLimit(plot, limit); }] },
  }, several ? uPlot.join(tables) : tables[0]);
};
const drawLimit = (plot, limit) => clipped(plot, (context, left, top, w) => {
  const y = plot.valToPos(limit, "y", true);
  context.strokeStyle = theme.text;
  context.lineWidth = 1.5 * dpr();
  context.setLineDash([2 * dpr(), 4 * dpr()]);
  context.beginPath(); context.moveTo(left, y); context.lineTo(left + w, y); context.stroke();
});
const rate = (load) => 1 / load.columnSeconds;
lines("throughput: what the device gave, and what readers had, by what they found", (value) => round(value) + "/s", [
  ["device", "given by the device", DEVICE, rate],
  ["hit", "hit", FOUND[1].color, rate], ["ahead", "just ahead", FOUND[2].color, rate],
  ["late", "late", FOUND[3].color, rate], ["miss", "missed", FOUND[4].color, rate],
], { limit: first.limit, limitText: "the device's limit, as explain has measured it" });
lines("memory: of these files in the page cache, and what is left for more", round, [
  ["resident", "in the cache", DEVICE], ["unused", "of it prefetched and not used yet: the policy's window", STATE[2].color],
  ["headroom", "headroom: what the memory cgroup of the reader still takes", ROOM],
], {});

// --- stalls: a lane a reader; the phases that it has marked are below ---
const LANE = 34, STALLS = 19; // pixels of a lane, and of its upper part
const phasesOf = (load, reader) => {
  const known = new Set(load.readers.map((one) => one.tgid));
  return load.phases.filter(([, , tgid]) => tgid === reader.tgid || !known.has(tgid));
};
const drawLanes = (load, count) => (plot) => clipped(plot, (context, left, top, w, h) => {
  const lane = h / count;
  drawn.stalls = 0;
  context.font = font(10);
  for (let at = 0; at < count; at++) {
    const begin = top + at * lane, upper = lane * STALLS / LANE;
    for (let column = 0; column < load.columns; column++) {
      const share = Math.min(1, load.stalls[at * load.columns + column] / load.columnSeconds);
      if (!share) continue;
      const x = plot.valToPos(column * load.columnSeconds, "x", true), end = plot.valToPos((column + 1) * load.columnSeconds, "x", true);
      context.fillStyle = css(FOUND[4].color, 0.15 + 0.85 * share);
      context.fillRect(x, begin + dpr(), Math.max(dpr(), end - x), upper - 2 * dpr());
      drawn.stalls++;
    }
    if (at) {
      context.setLineDash([]);
      context.strokeStyle = theme.line;
      context.lineWidth = dpr();
      context.beginPath(); context.moveTo(left, begin); context.lineTo(left + w, begin); context.stroke();
    }
    if (!load.readers[at]) continue;
    const phases = phasesOf(load, load.readers[at]);
    for (const [number, [time, name]] of phases.entries()) {
      const from = Math.max(left, plot.valToPos(time, "x", true));
      const next = number + 1 < phases.length ? phases[number + 1][0] : load.seconds;
      const to = Math.min(left + w, plot.valToPos(next, "x", true));
      if (to <= from) continue;
      context.fillStyle = css(ROOM, number % 2 ? 0.28 : 0.16);
      context.fillRect(from, begin + upper, to - from, lane - upper - dpr());
      if (context.measureText(visible(name)).width + 6 * dpr() > to - from) continue;
      context.fillStyle = theme.text;
      context.textAlign = "left";
      context.textBaseline = "alphabetic";
      context.fillText(visible(name), from + 3 * dpr(), begin + lane - 4 * dpr());
    }
  }
});
for (const load of data.loads) {
  const count = Math.max(1, load.readers.length);
  const keys = [[css(FOUND[4].color), "the darker, the more of the time it slept for I/O"]];
  if (load.phases.length) keys.push([css(ROOM, 0.28), "phases that it has marked"]);
  panel(named(load) + "readers: a lane for each process that read", keys, Math.min(640, 44 + LANE * count), {
    load, scales: { y: { dir: -1, range: () => [0, count] } },
    value: { splits: () => load.readers.map((_, at) => at + 0.5), values: () => load.readers.map((reader) => visible(reader.name).slice(0, 10) + " " + reader.tgid), font: "11px system-ui", grid: { show: false }, ticks: { show: false } },
    series: [{}, { paths: () => null, points: { show: false } }],
    hooks: { draw: [drawLanes(load, count)] },
  }, [[0, longest], [0, count]]);
}
