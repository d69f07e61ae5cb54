// The page: joins its parts to the front end, and stays whole when what it shows does not.

import { $, say } from "./dom.js";
import { Refused, events, get, onKeyNeeded, setKey } from "./api.js";
import { changed, onChange, store, take } from "./store.js";
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";
import { startPools } from "./pools.js";
import { startFlow } from "./flow.js";
import { startCache } from "./cache.js";

const SILENT_MS = 5000; // the front end says something every second
const RETRY_MS = [300, 700, 1500, 2500];

// --- connection ---

async function follow() {
  let failures = 0;
  for (;;) {
    const abort = new AbortController();
    let watchdog = 0;
    const heard = () => { clearTimeout(watchdog); watchdog = setTimeout(() => abort.abort(), SILENT_MS); };
    try {
      heard();
      const response = await get("baton/events", { signal: abort.signal });
      for await (const data of events(response, heard)) {
        failures = 0;
        take(JSON.parse(data));
      }
    } catch (error) {
      if (!(error instanceof Refused) && error.name !== "AbortError" && !(error instanceof TypeError)) console.error(error);
    }
    clearTimeout(watchdog);
    store.connected = false;
    changed();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    failures += 1;
  }
}

function showStatus() {
  const { state, connected } = store;
  const down = (state?.workers ?? []).filter((worker) => !worker.up).map((worker) => worker.id);
  let kind = "ok", text = "All up", notice = "";
  if (!connected) {
    [kind, text] = state ? ["bad", "Front end gone"] : ["wait", "Connecting"];
    if (state) notice = "The front end does not answer. What you see is how things stood; this page goes on by itself when it is back.";
  } else if (!state.router) {
    [kind, text] = ["bad", "Router gone"];
    notice = "The router is gone and is being started again. Streams wait, and go on where they stopped.";
  } else if (state.trouble) {
    [kind, text] = ["bad", "Can't serve"];
    notice = `Requests can't be served now: ${state.trouble}.`;
  } else if (down.length) {
    [kind, text] = ["bad", `${down.join(", ")} down`];
  }
  $("status").dataset.kind = kind;
  say($("status"), text);
  $("notice").hidden = !notice;
  say($("notice"), notice);
}

// --- key ---

onKeyNeeded((wasWrong) => new Promise((resolve) => {
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !wasWrong;
  $("key").value = "";
  if (dialog.open) { dialog.addEventListener("close", resolve, { once: true }); return; }
  dialog.addEventListener("close", () => {
    if ($("key").value) setKey($("key").value.trim());
    resolve();
  }, { once: true });
  dialog.showModal();
}));
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // without a key there is nothing to see

// --- theme ---

const THEMES = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const [sign, name] = THEMES[theme];
  $("theme").textContent = sign;
  $("theme").setAttribute("aria-label", `Theme: ${name}`);
  $("theme").title = `Theme: ${name}`;
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  localStorage.setItem("baton-theme", next);
  showTheme(next);
});

// --- begin ---

async function nameModel() {
  for (;;) {
    try {
      const { data } = await (await get("v1/models")).json();
      say($("model"), data[0].id);
      return data[0].id;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

showTheme(localStorage.getItem("baton-theme") ?? "");
const model = nameModel();
const flow = startFlow();
startChat(model, flow.select);
startCompare(model);
startPools();
startCache();
onChange(showStatus);
follow();
