// What the page asks of its front end. A key, if one is needed, lives in this tab only.

const KEY = "baton-key";

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

let ask = null; // shows the dialog; resolves when there is a key

export function onKeyNeeded(dialog) { ask = dialog; }
export function setKey(key) { sessionStorage.setItem(KEY, key); }

/** A fetch with the key. On 401 the key is asked for, until it is accepted. Throws Refused, or what fetch throws. */
export async function get(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status === 401 && ask) { await ask(Boolean(key)); continue; }
    let message = `${response.status} ${response.statusText}`;
    try { message = (await response.json()).error.message; } catch { /* it is not one of ours */ }
    throw new Refused(response.status, message);
  }
}

/** The data of server-sent events, one after the other. `heard` is called whenever something comes. */
export async function* events(response, heard = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const event = text.slice(0, end);
        text = text.slice(end + 2);
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** One chat completion, streamed: calls on(text) for each piece; returns the proof. */
export async function complete(body, signal, on) {
  const response = await get("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, baton: { ...body.baton, proof: true } }),
  });
  let proof = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") return proof;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(0, chunk.error.message);
    proof = chunk.baton?.proof ?? proof;
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) on(text);
  }
  throw new Refused(0, "the connection broke before the answer had ended");
}
