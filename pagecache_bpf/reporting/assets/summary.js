// SPDX-License-Identifier: Apache-2.0
// Second part of the report page's script: the sentence and the numbers on top.
document.getElementById("title").textContent = visible(first.model) + ": " +
  data.loads.map((load) => `${visible(load.label)} (${ruled(load)})`).join(" against ");
const NUMBERS = [
  ["read by the load", "bytes that its readers wanted", (n) => bytes(n.accessed_bytes)],
  ["from the first event to the last", "what the axis of time shows", (n) => seconds(n.active_seconds)],
  ["hit", "in the cache already, or prefetched in time", (n) => percent(n.all_hit_bytes / (n.accessed_bytes || 1))],
  ["just ahead", "first use of what the kernel's own readahead had brought", (n) => percent(n.ahead_bytes / (n.accessed_bytes || 1))],
  ["late", "prefetched by the policy, but its reader had to wait for it", (n) => percent(n.late_bytes / (n.accessed_bytes || 1))],
  ["missed", "fetched by the read that wanted it", (n) => percent(n.miss_bytes / (n.accessed_bytes || 1))],
  ["waited for I/O, all readers together", "time that they slept", (n) => seconds(n.stall_ns / 1e9)],
  ["prefetched by the policy", "", (n) => bytes(n.prefetched_bytes)],
  ["prefetched and never used", "left the cache before anybody wanted it", (n) => bytes(n.wasted_bytes)],
  ["given by the device", "whoever asked it", (n) => bytes(n.device_bytes)],
  ["of the device's limit", "as `pagecache-bpf explain` has last measured it", (n) => (n.device_share === null ? "unknown" : percent(n.device_share))],
  ["evicted: memory was short", "by reclaim", (n) => bytes(n.reclaimed_bytes)],
  ["evicted by the policy", "dropped behind the reader, or at the end", (n) => bytes(n.dropped_bytes)],
  ["evicted by programs", "fadvise, truncation, drop_caches", (n) => bytes(n.discarded_bytes)],
  ["mean distance from the template", "how far from its place in the template's order a byte was read", (n, load) => (load.template && load.template.distance !== null ? bytes(load.template.distance) : "no template")],
];
{
  const summary = document.getElementById("summary");
  for (const load of data.loads) element("p", (several ? visible(load.label) + ". " : "") + load.verdict, summary, "verdict");
  if (several) {
    const table = element("table", null, summary, "numbers");
    const head = element("tr", null, element("thead", null, table));
    element("th", "", head);
    for (const load of data.loads) element("th", visible(load.label), head);
    const body = element("tbody", null, table);
    for (const [text, help, value] of NUMBERS) {
      const line = element("tr", null, body);
      element("td", text, line).title = help;
      for (const load of data.loads) element("td", value(load.summary, load), line);
    }
  } else {
    const list = element("div", null, summary, "numbers");
    for (const [text, help, value] of NUMBERS) {
      const one = element("div", null, list);
      one.title = help;
      element("b", value(first.summary, first), one);
      element("span", text, one);
    }
  }
  for (const load of data.loads) {
    const notes = [], simulated = load.engine === "simulation" || load.kernel.startsWith("none");
    if (load.lost) notes.push(`${load.lost} events were lost for lack of room: the numbers are too low.`);
    if (load.uncounted.length && !simulated) notes.push("This kernel cannot count: " + load.uncounted.join(", ") + ".");
    if (simulated) notes.push("A replay of a trace through a model of the page cache, where reading takes no time: there are no stalls.");
    else notes.push(`Linux ${load.kernel}, ${new Date(load.started).toISOString()}.`);
    if (load.begin >= 0.001) notes.push(`Nothing happened in the first ${seconds(load.begin)}; times are counted from there.`);
    if (load.template) notes.push(`Template: ${visible(load.template.source)}.`);
    if (load.command) notes.push("Command: " + visible(load.command.replace(/\s+/g, " ").slice(0, 200)));
    element("p", named(load) + notes.join(" "), summary, "note");
  }
}
