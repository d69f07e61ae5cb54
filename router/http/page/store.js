// What the page knows: the last state of the house and the requests, kept through whatever dies meanwhile.

const KEPT = 2000;

export const store = {
  state: null, // as the front end sent it last; null: nothing yet
  connected: false,
  ended: [], // newest last
  version: 0, // grows when `ended` changes
};

const known = new Set();
const listeners = [];

export function onChange(listener) { listeners.push(listener); }

export function changed() { for (const listener of listeners) listener(); }

export function take({ state, ended }) {
  let sort = false;
  for (const record of ended) {
    if (known.has(record.id)) continue;
    known.add(record.id);
    const last = store.ended[store.ended.length - 1];
    sort ||= last && last.arrival_ns > record.arrival_ns;
    store.ended.push(record);
    store.version += 1;
  }
  if (sort) store.ended.sort((a, b) => a.arrival_ns - b.arrival_ns);
  while (store.ended.length > KEPT) known.delete(store.ended.shift().id);
  // a request that has just ended is not in flight any more, whichever was said first
  state.live = state.live.filter((record) => !known.has(record.id));
  store.state = state;
  store.connected = true;
  changed();
}

/** The parts of a request as [phase, from, to], ms after its arrival at the router; the front end's part is before 0. */
export function phases(record) {
  const parts = [];
  const proof = record.proof;
  const front = record.front_end ? Math.max((record.arrival_ns - record.front_end.received_ns) / 1e6, 0) : 0;
  if (front) parts.push(["front", -front, 0]);
  const first = record.ttft_ms;
  if (proof) {
    parts.push(["queue", 0, proof.queue_ms], ["prefill", proof.queue_ms, first]);
  } else {
    parts.push(["queue", 0, first || record.age_ms]);
  }
  if (!first) return parts;
  const second = record.second_token_ms || first;
  const ready = proof?.handoff_ms ? Math.min(first + proof.handoff_ms, second) : first;
  if (ready > first) parts.push(["handoff", first, ready]);
  if (second > ready) parts.push(["first", ready, second]);
  if (record.age_ms > second) parts.push(["decode", second, record.age_ms]);
  return parts;
}

export const PHASES = {
  front: "front end", queue: "queue", prefill: "prefill", handoff: "handoff", first: "first decode", decode: "decode",
};

export function itl(record) {
  const produced = record.output_tokens - record.resumed_tokens;
  return produced > 1 && record.ttft_ms ? (record.age_ms - record.ttft_ms) / (produced - 1) : 0;
}

export const outcome = (record) => record.outcome ?? "live";
