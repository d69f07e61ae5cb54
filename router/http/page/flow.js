// Requests as a waterfall, newest first. However many there are, only the rows that can be seen exist.

import { $, clock, duration, h, plural, say, size } from "./dom.js";
import { get } from "./api.js";
import { PHASES, itl, onChange, outcome, phases, store } from "./store.js";

const ROW = 26; // px, as in style.css
const SPARE = 4; // rows above and below what is seen

let shown = []; // that pass the filter, newest first
let selected = null; // id
let scale = 1; // ms over the whole width
let paused = false;
let fetched = null; // a record that was looked up
const pool = [];

export function startFlow() {
  for (const [phase, name] of Object.entries(PHASES)) $("legend").append(h("li", {}, h("i", { class: `phase-${phase}` }), name));
  onChange(() => { if (!paused) refresh(); });
  for (const id of ["filter", "outcome"]) $(id).addEventListener("input", refresh);
  for (const radio of document.querySelectorAll('input[name="scale"]')) radio.addEventListener("change", refresh);
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").setAttribute("aria-pressed", String(paused));
    say($("pause"), paused ? "Paused" : "Pause");
    if (!paused) refresh();
  });
  $("list").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  $("list").addEventListener("keydown", onKey);
  new ResizeObserver(() => draw()).observe($("list"));
  return { select: (id) => { select(id); $("requests").scrollIntoView({ block: "start" }); } };
}

function refresh() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = $("outcome").value;
  const live = store.connected && store.state ? store.state.live : [];
  const all = live.length ? [...store.ended, ...live].sort((a, b) => a.arrival_ns - b.arrival_ns) : store.ended;
  const before = shown.length && $("list").scrollTop > ROW ? shown[Math.floor($("list").scrollTop / ROW)]?.id : null;
  shown = [];
  for (let i = all.length - 1; i >= 0; i -= 1) {
    const record = all[i];
    if (wanted && outcome(record) !== wanted) continue;
    if (words.length && !matches(record, words)) continue;
    shown.push(record);
  }
  if (before) { // who reads further down is not moved by what comes in at the top
    const now = shown.findIndex((record) => record.id === before);
    if (now > 0) $("list").scrollTop = now * ROW + ($("list").scrollTop % ROW);
  }
  say($("counts"), `${shown.length.toLocaleString("en")} of ${plural(all.length, "request")}${live.length ? `, ${live.length} in flight` : ""}`);
  setScale();
  draw();
  showDetails();
}

function matches(record, words) {
  const text = [record.id, record.client_id, record.answer_id, record.trace.trace_id, record.route, record.why, record.error,
    record.prefill_worker, record.decode_worker, outcome(record), record.prefix].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

const isWhole = () => document.querySelector('input[name="scale"]:checked').value === "whole";

/** The width of a row: nine of ten of the last requests fit. */
function setScale() {
  const whole = isWhole();
  const ends = shown.slice(0, 400).map((r) => (whole ? r.age_ms : (r.second_token_ms || r.ttft_ms || r.age_ms) * 1.15)).sort((a, b) => a - b);
  const wanted = ends.length ? Math.max(ends[Math.floor(ends.length * 0.9)], 1) : 100;
  const unit = 10 ** Math.floor(Math.log10(wanted));
  scale = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * unit >= wanted) * unit;
  const ticks = [0, 0.5, 1];
  const axis = $("axis");
  if (axis.dataset.scale !== String(scale)) {
    axis.dataset.scale = String(scale);
    axis.replaceChildren(...ticks.map((at) => {
      const tick = h("i", {}, at ? duration(at * scale) : "0");
      tick.style.left = `${at * 100}%`;
      return tick;
    }));
  }
}

// --- rows ---

function draw() {
  const list = $("list");
  $("rows").style.height = `${shown.length * ROW}px`;
  list.setAttribute("role", shown.length ? "listbox" : "group"); // a listbox has to have options
  const none = list.querySelector(".none");
  if (!shown.length && !none) list.append(h("div", { class: "none" }, "No requests yet. Ask something, or widen the filter."));
  else if (shown.length && none) none.remove();
  const first = Math.max(Math.floor(list.scrollTop / ROW) - SPARE, 0);
  const last = Math.min(first + Math.ceil(list.clientHeight / ROW) + 2 * SPARE, shown.length);
  while (pool.length < last - first) {
    const row = makeRow();
    pool.push(row);
    $("rows").append(row.element);
  }
  pool.forEach((row, i) => {
    const record = shown[first + i];
    row.element.hidden = first + i >= last;
    if (!row.element.hidden) fill(row, record, first + i);
  });
  const active = pool.find((row) => !row.element.hidden && row.id === selected);
  if (active) list.setAttribute("aria-activedescendant", active.element.id);
  else list.removeAttribute("aria-activedescendant");
}

let rows = 0;

function makeRow() {
  rows += 1;
  const row = {
    id: null, when: h("span", { class: "when" }), route: h("span", { class: "route" }), track: h("span", { class: "track" }),
    ttft: h("span", { class: "number" }), total: h("span", { class: "number" }), bars: [],
  };
  row.element = h("div", { class: "request", role: "option", id: `row-${rows}`, onclick: () => select(row.id) },
    row.when, row.route, row.track, row.ttft, row.total);
  return row;
}

function fill(row, record, index) {
  row.id = record.id;
  const how = outcome(record);
  const element = row.element;
  element.style.transform = `translateY(${index * ROW}px)`;
  element.classList.toggle("live", how === "live");
  element.classList.toggle("failed", how === "failed");
  element.setAttribute("aria-selected", String(record.id === selected));
  element.setAttribute("aria-posinset", index + 1);
  element.setAttribute("aria-setsize", shown.length);
  element.setAttribute("data-id", record.id);
  element.setAttribute("data-outcome", how);
  const route = how === "ok" || how === "live" ? (record.route || record.state) : how;
  element.setAttribute("aria-label", `${route}, ${how}, time to first token ${duration(record.ttft_ms)}, in all ${duration(record.age_ms)}`);
  element.title = record.error || record.why;
  say(row.when, clock(record.arrival_ns / 1e6));
  say(row.route, record.attempts > 1 ? `${route} ×${record.attempts}` : route);
  row.route.classList.toggle("bad", how === "failed");
  row.route.classList.toggle("warn", how === "refused" || how === "cancelled");
  say(row.ttft, record.ttft_ms ? duration(record.ttft_ms) : "–");
  say(row.total, duration(record.age_ms));
  lay(row, phases(record));
}

/** Sets the bars of a track; what goes beyond the scale is cut at the right. */
function lay(row, parts) {
  const start = parts[0][1];
  parts.forEach(([phase, from, to], i) => {
    const bar = (row.bars[i] ??= row.track.appendChild(document.createElement("i")));
    bar.hidden = false;
    bar.className = `phase-${phase}`;
    bar.style.left = `${Math.min((100 * (from - start)) / scale, 100)}%`;
    bar.style.width = `${Math.min((100 * (to - from)) / scale, 100)}%`;
  });
  for (let i = parts.length; i < row.bars.length; i += 1) row.bars[i].hidden = true;
}

function onKey(event) {
  const page = Math.max(Math.floor($("list").clientHeight / ROW) - 1, 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length };
  if (event.key === "Escape") { select(null); return; }
  if (!(event.key in moves) || !shown.length) return;
  event.preventDefault();
  const now = shown.findIndex((record) => record.id === selected);
  const next = Math.min(Math.max((now < 0 ? (moves[event.key] > 0 ? -1 : 0) : now) + moves[event.key], 0), shown.length - 1);
  const top = next * ROW, list = $("list");
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  select(shown[next].id);
}

// --- details ---

function find(id) {
  return shown.find((r) => r.id === id) ?? store.ended.find((r) => r.id === id) ?? store.state?.live.find((r) => r.id === id);
}

async function select(id) {
  selected = id;
  draw();
  showDetails();
  if (!id || find(id)) return;
  try { // not here any more, or not yet
    fetched = (await (await get(`baton/requests/${encodeURIComponent(id)}`)).json()).requests[0];
  } catch {
    fetched = null;
  }
  showDetails();
}

let detailed = "";

function showDetails() {
  const record = find(selected) ?? (fetched?.id === selected ? fetched : null);
  const details = $("details");
  details.hidden = !record;
  if (!record) { detailed = ""; return; }
  const version = `${record.id} ${record.outcome} ${record.outcome ? "" : record.age_ms} ${isWhole()}`;
  if (version === detailed) return;
  detailed = version;
  const parts = phases(record), start = parts[0][1];
  const end = isWhole() || !record.second_token_ms ? record.age_ms : Math.min(record.second_token_ms * 1.3, record.age_ms);
  const whole = Math.max(end - start, 0.01);
  const how = outcome(record);
  details.replaceChildren(
    h("div", { class: "head" },
      h("b", {}, record.id), h("span", { class: how === "failed" ? "bad" : "muted" }, how === "live" ? `in flight, ${record.state.replace("_", " ")}` : how),
      h("span", { class: "spring" }),
      h("button", { type: "button", class: "quiet", onclick: () => navigator.clipboard?.writeText(record.id) }, "Copy id"),
      h("button", { type: "button", class: "quiet", onclick: () => { select(null); $("list").focus(); } }, "Close")),
    h("p", { class: "why" }, record.error || record.why || "no route yet"),
    h("div", { class: "spans" }, ...parts.flatMap(([phase, from, to]) => {
      const bar = h("i", { class: `phase-${phase}` });
      bar.style.left = `${(100 * (from - start)) / whole}%`;
      bar.style.width = `${(100 * (to - from)) / whole}%`;
      const name = phase === "queue" && !record.proof ? "queue, prefill" : PHASES[phase];
      return [h("span", {}, name), h("span", { class: "number" }, duration(to - from)), h("span", { class: "track" }, bar)];
    })),
    facts(record),
  );
}

function facts(record) {
  const proof = record.proof;
  const list = {
    TTFT: record.ttft_ms && duration(record.ttft_ms), "mean ITL": itl(record) && duration(itl(record)),
    "longest gap": record.longest_gap_ms && duration(record.longest_gap_ms), total: duration(record.age_ms),
    "prompt tokens": record.prompt_tokens, "output tokens": record.output_tokens,
    prefill: record.prefill_worker, decode: record.decode_worker, attempts: record.attempts > 1 && record.attempts,
  };
  if (proof) {
    for (const source of ["reused", "received", "recomputed", "computed"]) list[`KV ${source}`] = proof[`kv_tokens_${source}`];
    list["prefill reused"] = proof.prefill_tokens_reused;
    if (proof.kv_bytes) {
      list.moved = `${size(proof.kv_bytes)} in ${duration(proof.transfer_ms)}`;
      list.digest = proof.digest;
      list.transport = proof.transport;
    }
  }
  const wide = { trace: record.trace.trace_id, client: record.client_id !== record.trace.trace_id && record.client_id, answer: record.answer_id };
  record.troubles.forEach((trouble, i) => { wide[`attempt ${i + 1} failed`] = `after ${duration(trouble.ms)}: ${trouble.why}`; });
  const row = (name, value, kind) => h("div", { class: kind }, h("dt", {}, name), h("dd", { class: kind && "mono" }, String(value)));
  const given = (object) => Object.entries(object).filter(([, value]) => value || value === 0);
  return h("dl", { class: "facts" }, ...given(list).map(([n, v]) => row(n, v)), ...given(wide).map(([n, v]) => row(n, v, "wide")));
}
