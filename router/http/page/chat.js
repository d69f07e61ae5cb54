// A conversation. An answer that is stopped is cancelled at the server, too.

import { $, duration, h } from "./dom.js";
import { complete } from "./api.js";

export function startChat(model, select) {
  const log = $("log");
  const messages = [];
  let abort = null;

  const empty = h("p", { class: "empty small" }, "Answers stream in here, each with what the router did for it.");
  log.append(empty);

  function add(role, text = "") {
    empty.remove();
    const body = h("div", { class: "text" }, text);
    const under = h("div", { class: "under" });
    const message = h("div", { class: `message ${role}` }, h("span", { class: "hidden" }, role === "user" ? "You: " : "Model: "), body, under);
    log.append(message);
    log.scrollTop = log.scrollHeight;
    return { body, under };
  }

  async function send(text) {
    add("user", text);
    messages.push({ role: "user", content: text });
    const { body, under } = add("assistant");
    body.classList.add("caret");
    abort = new AbortController();
    $("stop").hidden = false;
    $("send").disabled = true;
    let answer = "";
    try {
      const proof = await complete(
        {
          model: await model, messages,
          max_tokens: Number($("max-tokens").value) || undefined, temperature: Number($("temperature").value),
          baton: { route: $("route").value || undefined },
        },
        abort.signal,
        (piece) => {
          answer += piece;
          const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
          body.textContent = answer;
          if (atEnd) log.scrollTop = log.scrollHeight;
        },
      );
      if (proof) under.append(...told(proof, select));
    } catch (error) {
      const stopped = abort.signal.aborted;
      under.textContent = stopped ? "Stopped" : error.message === "Failed to fetch" ? "The front end does not answer." : error.message;
      under.classList.toggle("bad", !stopped);
    }
    body.classList.remove("caret");
    if (answer) messages.push({ role: "assistant", content: answer });
    else messages.pop();
    $("stop").hidden = true;
    $("send").disabled = false;
    abort = null;
    log.scrollTop = log.scrollHeight;
  }

  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    if (!text || abort) return;
    $("prompt").value = "";
    send(text);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => abort?.abort());
  $("clear").addEventListener("click", () => {
    abort?.abort();
    messages.length = 0;
    log.replaceChildren(empty);
  });
  for (const radio of document.querySelectorAll('input[name="mode"]')) {
    radio.addEventListener("change", () => {
      $("chat-panel").hidden = radio.value !== "chat";
      $("compare-panel").hidden = radio.value !== "compare";
    });
  }
}

/** The line under an answer, from its proof. */
function told(proof, select) {
  const way = proof.prefill_worker === proof.decode_worker
    ? `${proof.route} (${proof.decode_worker})`
    : `${proof.route} (${proof.prefill_worker} → ${proof.decode_worker})`;
  const kv = ["reused", "received", "recomputed", "computed"]
    .filter((source) => proof[`kv_tokens_${source}`])
    .map((source) => `${proof[`kv_tokens_${source}`]} ${source}`);
  const line = `${way} · TTFT ${duration(proof.ttft_ms)} · ${duration(proof.e2e_ms)} in all · KV ${kv.join(", ") || "none"} `;
  return [line, h("button", { type: "button", onclick: () => select(proof.request_id) }, "Show")];
}
