// The workers by role. Cards are made once and then only changed, so that nothing jumps or loses the focus.

import { $, draw, h, percent, plural, say, size } from "./dom.js";
import { onChange, store } from "./store.js";

const ROLES = [["prefill", "Prefill"], ["decode", "Decode"], ["aggregated", "Aggregated"]];
const HISTORY = 60; // points of a sparkline
const EVERY_MS = 1000;

const cards = new Map();

export function startPools() {
  const pools = new Map(ROLES.map(([role, title]) => {
    const list = h("div", { class: "cards" });
    const pool = h("div", { class: "pool", hidden: true }, h("h3", {}, title), list);
    $("workers").append(pool);
    return [role, { pool, list, title: pool.firstElementChild, name: title }];
  }));
  onChange(() => show(pools));
}

function show(pools) {
  const { state, connected } = store;
  if (!state) return;
  const known = connected && state.router;
  say($("house"), known ? `${plural(state.requests, "request")} in the house, ${plural(state.queued_tokens, "token")} waiting` : "as last known");
  const seen = new Set();
  for (const worker of [...state.workers].sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }))) {
    seen.add(worker.id);
    const { pool, list } = pools.get(worker.role);
    pool.hidden = false;
    let card = cards.get(worker.id);
    if (!card) {
      card = makeCard(worker.id);
      cards.set(worker.id, card);
      list.append(card.element);
    }
    update(card, worker, known);
  }
  for (const [id, card] of cards) if (!seen.has(id)) { card.element.remove(); cards.delete(id); }
  for (const { pool, list, title, name } of pools.values()) {
    pool.style.flexGrow = list.children.length;
    pool.style.flexBasis = `${Math.min(list.children.length, 3) * 176}px`; // side by side while there is room
    const down = list.querySelectorAll(".down").length;
    say(title, `${name} · ${plural(list.children.length, "worker")}${down ? `, ${down} down` : ""}`);
  }
}

function makeCard(id) {
  const card = {
    state: h("span", { class: "state" }), batch: h("b"), queue: h("b"), tokens: h("span"), under: h("div", { class: "under" }),
    held: h("i", { class: "held" }), cached: h("i", { class: "cached" }), history: [], at: 0, downSince: 0,
  };
  card.spark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  card.spark.setAttribute("aria-hidden", "true");
  card.kv = h("div", { class: "kv", role: "img" }, card.held, card.cached);
  card.element = h("article", { class: "card", "aria-label": `Worker ${id}`, "data-worker": id },
    h("div", { class: "head" }, h("span", { class: "name" }, id), card.state),
    h("div", { class: "figures" }, h("div", {}, card.batch, h("span", {}, " in batch")), h("div", {}, card.queue, h("span", {}, " queued"), card.tokens), card.spark),
    card.kv, card.under);
  return card;
}

function update(card, worker, known) {
  const load = worker.load;
  const up = worker.up && known;
  if (worker.up) card.downSince = 0;
  else card.downSince ||= Date.now();
  card.element.classList.toggle("down", !worker.up);
  const silent = worker.silent_s > 1.5 ? `, silent for ${worker.silent_s.toFixed(0)} s` : "";
  const rests = worker.resting ? `, rests: ${worker.resting}` : "";
  say(card.state, worker.up ? (known ? `up${silent}${rests}` : "unknown") : `down for ${Math.max(Math.round((Date.now() - card.downSince) / 1000), 1)} s`);
  card.state.classList.toggle("unknown", worker.up && !known);
  say(card.batch, String(up ? load.running_requests : 0));
  say(card.queue, String(up ? load.queued_requests : 0));
  say(card.tokens, up && load.queued_tokens ? ` (${load.queued_tokens.toLocaleString("en")} tokens)` : "");
  card.held.style.width = `${(100 * load.held_blocks) / Math.max(load.total_blocks, 1)}%`;
  card.cached.style.width = `${(100 * load.cached_blocks) / Math.max(load.total_blocks, 1)}%`;
  const pool = `KV ${percent(load.held_blocks, load.total_blocks)} held, ${percent(load.cached_blocks, load.total_blocks)} cached of ${size(load.total_blocks * worker.block_bytes)}`;
  card.kv.setAttribute("aria-label", pool);
  say(card.under, load.active_leases ? `${pool}, ${plural(load.active_leases, "lease")}` : pool);
  if (Date.now() - card.at >= EVERY_MS) {
    card.at = Date.now();
    card.history.push(up ? load.running_requests + load.queued_requests : 0);
    if (card.history.length > HISTORY) card.history.shift();
    const padded = [...Array(HISTORY - card.history.length).fill(0), ...card.history];
    draw(card.spark, padded, Math.max(4, ...padded), "var(--muted)");
  }
}
