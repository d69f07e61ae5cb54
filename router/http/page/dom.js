// Small things that every part of the page uses. Text only ever goes in as text.

export const $ = (id) => document.getElementById(id);

/** An element: h("button", { type: "button", class: "main", onclick }, "Send"). */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Sets the text only when it differs: nothing is laid out, or read out, again without need. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A <polyline> of `values` over the whole of a small <svg>, from 0 to `top`. */
export function draw(svg, values, top, colour) {
  const ns = "http://www.w3.org/2000/svg";
  const [width, height] = [200, 60];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  let line = svg.firstElementChild;
  if (!line) {
    line = document.createElementNS(ns, "polyline");
    line.setAttribute("fill", "none");
    line.setAttribute("stroke-width", "1.5");
    line.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(line);
  }
  line.style.stroke = colour;
  const step = width / Math.max(values.length - 1, 1);
  const points = values.map((v, i) => `${(i * step).toFixed(1)},${(height - 2 - (Math.min(v, top) / top) * (height - 4)).toFixed(1)}`);
  line.setAttribute("points", points.join(" "));
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** Milliseconds as a person reads them: 0.7 ms, 42 ms, 1.24 s. */
export function duration(ms) {
  if (!ms) return "0";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}%` : "0%");

export function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB", { hour12: false });
}
