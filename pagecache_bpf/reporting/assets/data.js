// SPDX-License-Identifier: Apache-2.0
// First part of the report page's script: what reporting/page.py has put into the page, unpacked.
// Names of files, tensors and processes are only ever set as text, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const counterAt = Object.fromEntries(data.counters.map((counter, at) => [counter.name, at]));
// Okabe and Ito's colors, which people with any kind of color vision can tell apart.
const FOUND = [null,
  { text: "hit: it was there", color: [0, 158, 115] },
  { text: "just ahead: the kernel's readahead was still ahead of it", color: [86, 180, 233] },
  { text: "late: prefetched, the reader waited for it", color: [230, 159, 0] },
  { text: "missed: the reader had it fetched", color: [213, 94, 0] }];
const STATE = [
  { text: "not in the cache", color: [255, 255, 255] },
  { text: "in the cache", color: [150, 150, 150] },
  { text: "prefetched, not used yet", color: [204, 121, 167] },
  { text: "evicted", color: [240, 228, 66] }];
const EVICTED = 3;
const DEVICE = [128, 128, 152], ROOM = [0, 114, 178];

const unpack = async (text, Type) => {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
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
const round = (count) => bytes(count).replace(".0 ", " "); // for axes, whose marks are round numbers
const percent = (part) => (100 * part).toFixed(1) + "%";
const seconds = (time) => (Math.abs(time) < 1 ? (1000 * time).toFixed(1) + " ms" : time.toFixed(2) + " s");
const css = (color, alpha) => (alpha === undefined ? `rgb(${color.join(",")})` : `rgba(${color.join(",")},${alpha})`);
const visible = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
const base = (path) => visible(path.slice(path.lastIndexOf("/") + 1));

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
  if (load.template) {
    load.template.cells = await unpack(load.template.cells, Int32Array);
    load.template.place = await unpack(load.template.place, Float64Array);
  }
  load.seconds = load.columns * load.columnSeconds;
  // The events of each row lie together: from[row] to from[row + 1] of order.
  load.order = Int32Array.from(details.row.keys()).sort((a, b) => details.row[a] - details.row[b] || details.column[a] - details.column[b]);
  load.from = new Int32Array(load.rows + 1);
  for (const row of details.row) load.from[row + 1]++;
  for (let row = 0; row < load.rows; row++) load.from[row + 1] += load.from[row];
};
const counter = (load, event, name) => load.details.counters[counterAt[name] * load.details.count + event];
for (const load of data.loads) await prepare(load);
const first = data.loads[0], several = data.loads.length > 1;
const longest = Math.max(...data.loads.map((load) => load.seconds));
const ruled = (load) => (load.policy ? `${load.policy} on ${load.engine}` : "the kernel's default");
const named = (load) => (several ? visible(load.label) + ": " : "");

// --- what lies where ---
const fileAt = (load, place) => {
  let low = 0, high = load.files.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (load.files[middle].base <= place) low = middle; else high = middle - 1; }
  return load.files[low];
};
/** The first tensor that ends behind a place. */
const tensorBehind = (load, place) => {
  const { start, bytes: lengths, count } = load.tensors;
  let low = 0, high = count;
  while (low < high) { const middle = (low + high) >> 1; if (start[middle] + lengths[middle] <= place) low = middle + 1; else high = middle; }
  return low;
};
const tensorsIn = (load, from, to) => {
  const found = [];
  for (let at = tensorBehind(load, from); at < load.tensors.count && load.tensors.start[at] < to; at++) found.push(at);
  return found;
};
const rowRange = (load, row) => [row * load.totalBytes / load.rows, (row + 1) * load.totalBytes / load.rows];
