// The same prompt through prefill and decode workers, then through an aggregated one; measured here, as a client sees it.

import { $, draw, duration, h, say } from "./dom.js";
import { complete } from "./api.js";

const WAYS = [["remote", "Disaggregated"], ["aggregated", "Aggregated"]];
const DISTURBANCE_WORDS = 1200;

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0);
const p95 = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length * 0.95)] ?? 0;
const worst = (values) => values.reduce((a, b) => Math.max(a, b), 0);

export function startCompare(model) {
  let abort = null;

  $("compare-stop").addEventListener("click", () => abort?.abort());
  $("compare-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (abort) return;
    abort = new AbortController();
    $("compare-stop").hidden = false;
    $("compare-run").disabled = true;
    say($("verdict"), "");
    const panes = WAYS.map(([route, title]) => pane(route, title));
    $("ways").replaceChildren(...panes.map((each) => each.element));
    const results = [];
    try {
      for (const each of panes) results.push(await run(each, await model, abort.signal));
      say($("verdict"), verdict(results));
    } catch (error) {
      say($("verdict"), abort.signal.aborted ? "Stopped" : error.message);
    }
    const top = worst(results.flatMap((result) => result.gaps)) * 1.1 || 1;
    results.forEach((result, i) => draw(panes[i].plot, result.gaps, top, i ? "var(--prefill)" : "var(--decode)"));
    $("compare-stop").hidden = true;
    $("compare-run").disabled = false;
    abort = null;
  });
}

function pane(route, title) {
  const figures = {};
  const list = h("dl");
  for (const name of ["TTFT", "ITL, mean", "ITL, p95", "ITL, longest"]) {
    figures[name] = h("dd", {}, "–");
    list.append(h("dt", {}, name), figures[name]);
  }
  const plot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${title}: time between tokens over the answer`);
  const text = h("div", { class: "text", tabindex: "0", role: "region", "aria-label": `Answer, ${title.toLowerCase()}` });
  const why = h("div", { class: "why" });
  return { route, text, figures, plot, why, element: h("div", { class: "way" }, h("h3", {}, title), list, plot, text, why) };
}

async function run(pane, model, signal) {
  const salt = `compare-${crypto.randomUUID ? crypto.randomUUID() : Math.random()}`;
  const began = performance.now();
  let last = 0, ttft = 0, answer = "", disturbed = null;
  const gaps = [];
  const proof = await complete(
    {
      model, messages: [{ role: "user", content: $("compare-prompt").value }], temperature: 0, ignore_eos: true,
      max_tokens: Number($("compare-tokens").value) || 60, baton: { route: pane.route, cache_salt: salt },
    },
    signal,
    (piece) => {
      const now = performance.now();
      if (last) gaps.push(now - last);
      else ttft = now - began;
      last = now;
      answer += piece;
      pane.text.textContent = answer;
      pane.text.scrollTop = pane.text.scrollHeight;
      say(pane.figures.TTFT, duration(ttft));
      say(pane.figures["ITL, mean"], duration(mean(gaps)));
      say(pane.figures["ITL, p95"], duration(p95(gaps)));
      say(pane.figures["ITL, longest"], duration(worst(gaps)));
      draw(pane.plot, gaps, worst(gaps) * 1.1 || 1, "var(--muted)");
      if (!disturbed && gaps.length === 8 && $("disturb").checked) disturbed = disturb(model, pane.route, salt, signal);
    },
  );
  await disturbed;
  say(pane.why, proof ? `${proof.route}: ${proof.why}` : "");
  return { ttft, gaps, route: proof?.route, wanted: pane.route };
}

/** A long prompt that arrives while the stream runs: what stalls it where one engine does both. */
async function disturb(model, route, salt, signal) {
  const words = Array.from({ length: DISTURBANCE_WORDS }, (_, i) => `${salt.slice(8, 12)}${(i * 7919) % 1000}`).join(" ").slice(0, 6000);
  try {
    await complete({ model, messages: [{ role: "user", content: words }], max_tokens: 1, baton: { route, cache_salt: salt } }, signal, () => {});
  } catch { /* only there to disturb */ }
}

function verdict([split, whole]) {
  if (whole.route !== "aggregated") return "This deployment has no aggregated worker, so both went the same way.";
  if (split.route !== "remote") return "This deployment has no prefill worker, so there was nothing to hand over.";
  const first = than(split.ttft, whole.ttft, "sooner", "later");
  const between = than(mean(split.gaps), mean(whole.gaps), "shorter", "longer");
  return `Disaggregated: first token ${first}, time between tokens ${between}.`;
}

function than(value, other, less, more) {
  const change = Math.round(100 * Math.abs(1 - value / other));
  if (change < 3) return "the same";
  return change < 100 ? `${change}% ${value < other ? less : more}` : `${(value / other).toFixed(1)} times as long`;
}
