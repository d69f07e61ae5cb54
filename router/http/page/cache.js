// What the prefix caches spare: where prompt tokens had their KV from, and which prompts begin alike.

import { $, h, percent, plural, say, size } from "./dom.js";
import { onChange, store } from "./store.js";

const EVERY_MS = 1000;
const WINDOW = 500; // requests that are counted
const STRIP = 120; // requests that are drawn
const FAMILIES = 8;

let shownAt = 0, shownVersion = -1;

export function startCache() {
  const body = $("cache-body");
  const view = {
    sources: h("div", { class: "sources" }), strip: h("div", { class: "strip", role: "img", "aria-label": "Share of cached tokens in the last prompts" }),
    families: h("tbody"), legend: h("ul", { class: "legend", "aria-label": "Colours" }), none: h("p", { class: "muted small" }, "No finished requests yet."),
  };
  for (const [kind, name] of [["reused", "reused from the cache"], ["stored", "from stores and other caches"], ["received", "received"], ["computed", "computed"], ["recomputed", "computed again"], ["other", "last token, never cached"]]) {
    view.legend.append(h("li", {}, h("i", { class: `source-${kind}` }), name));
  }
  const table = h("table", {}, h("caption", {}, "Prompts that begin alike"),
    h("thead", {}, h("tr", {}, ...["begins", "requests", "prompt tokens", "hit", "tokens spared"].map((name, i) =>
      h("th", { scope: "col", class: i && "number" }, name)), h("th", { scope: "col" }, "served by"))), view.families);
  view.full = h("div", { hidden: true }, view.sources);
  view.more = h("div", { hidden: true }, h("h3", {}, `The last ${STRIP} prompts, oldest left`), view.strip);
  view.table = h("div", { class: "scroll", hidden: true, tabindex: "0", role: "region", "aria-label": "Prompts that begin alike" }, table);
  body.append(view.none, view.full, view.more, view.legend, view.table);
  onChange(() => show(view));
}

function show(view) {
  if (Date.now() - shownAt < EVERY_MS || !store.state) return;
  shownAt = Date.now();
  const cached = store.state.workers.reduce((sum, w) => sum + w.load.cached_blocks * w.block_bytes, 0);
  say($("cache-sum"), `${size(cached)} cached${store.state.router ? `, ${plural(store.state.index_blocks, "block")} in the router's index` : ""}`);
  if (shownVersion === store.version) return;
  shownVersion = store.version;
  const proven = store.ended.filter((record) => record.proof).slice(-WINDOW);
  view.none.hidden = proven.length > 0;
  for (const part of [view.full, view.more, view.table]) part.hidden = !proven.length;
  if (!proven.length) return;
  showSources(view.sources, proven);
  showStrip(view.strip, proven.slice(-STRIP));
  showFamilies(view.families, proven);
}

/** Tokens of a prompt by source, at whoever decodes. */
function sources({ proof, prompt_tokens }) {
  const [reused, received] = [proof.kv_tokens_reused, proof.kv_tokens_received];
  const stored = proof.kv_tokens_node + proof.kv_tokens_remote;
  const [computed, recomputed] = [proof.kv_tokens_computed, proof.kv_tokens_recomputed];
  const other = Math.max(prompt_tokens - reused - stored - received - computed - recomputed, 0);
  return { reused, stored, received, computed, recomputed, other };
}

function showSources(element, records) {
  const prefill = { reused: 0, stored: 0, computed: 0 };
  const decode = { reused: 0, stored: 0, received: 0, computed: 0, recomputed: 0, other: 0 };
  for (const record of records) {
    prefill.reused += record.proof.prefill_tokens_reused;
    prefill.stored += fetched(record.proof);
    prefill.computed += record.proof.prefill_tokens_computed;
    for (const [kind, tokens] of Object.entries(sources(record))) decode[kind] += tokens;
  }
  element.replaceChildren(...stack("Where it was prefilled", prefill), ...stack("Where it is decoded", decode));
}

/** Tokens that whoever prefilled did not have to compute, since stores or other workers had them. */
function fetched(proof) {
  return proof.prefill_tokens_node + proof.prefill_tokens_remote + proof.prefill_tokens_peer;
}

function stack(title, tokens) {
  const total = Object.values(tokens).reduce((a, b) => a + b, 0);
  const bars = Object.entries(tokens).filter(([, count]) => count).map(([kind, count]) => {
    const bar = h("i", { class: `source-${kind}` });
    bar.style.width = `${(100 * count) / total}%`;
    return bar;
  });
  const text = `${percent(tokens.reused + tokens.stored, total)} reused of ${plural(total, "token")}`;
  return [h("span", {}, title), h("div", { class: "stack", role: "img", "aria-label": `${title}: ${text}` }, ...bars), h("span", { class: "muted" }, text)];
}

function showStrip(element, records) {
  element.replaceChildren(...records.map((record) => {
    const tokens = sources(record);
    const total = Math.max(record.prompt_tokens, 1);
    const column = h("span", { title: `${record.id}: ${tokens.reused} of ${record.prompt_tokens} tokens reused` });
    for (const [kind, count] of Object.entries(tokens)) {
      if (!count) continue;
      const bar = h("i", { class: `source-${kind}` });
      bar.style.height = `${(100 * count) / total}%`;
      column.append(bar);
    }
    return column;
  }));
}

function showFamilies(element, records) {
  const families = new Map();
  for (const record of records) {
    const family = families.get(record.prefix) ?? { requests: 0, prompt: 0, spared: 0, workers: new Set() };
    families.set(record.prefix, family);
    family.requests += 1;
    family.prompt += record.prompt_tokens;
    family.spared += record.proof.prefill_tokens_reused + fetched(record.proof);
    family.workers.add(record.prefill_worker).add(record.decode_worker);
  }
  const most = [...families.entries()].sort((a, b) => b[1].spared - a[1].spared || b[1].requests - a[1].requests).slice(0, FAMILIES);
  element.replaceChildren(...most.map(([prefix, family]) => h("tr", {},
    h("td", { class: "mono" }, prefix.slice(0, 8)), h("td", { class: "number" }, String(family.requests)),
    h("td", { class: "number" }, Math.round(family.prompt / family.requests).toLocaleString("en")),
    h("td", { class: "number" }, percent(family.spared, family.prompt)), h("td", { class: "number" }, family.spared.toLocaleString("en")),
    h("td", {}, [...family.workers].sort().join(", ")))));
}
