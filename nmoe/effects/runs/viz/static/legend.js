// The legend of a chart: the last and the best value of each line; the line under the mouse is lit in every chart.
import { html, useEffect, useState } from "./vendor/preact-htm.mjs";

const MAX_ROWS = 40;

/** Lights the lines of this name in every chart; null lights all alike. */
export function highlight(name) {
  document.dispatchEvent(new CustomEvent("nmoe-highlight", { detail: name }));
}

/** The name that is lit now. */
export function useHighlight() {
  const [lit, setLit] = useState(null);
  useEffect(() => {
    const listen = (event) => setLit(event.detail);
    document.addEventListener("nmoe-highlight", listen);
    return () => document.removeEventListener("nmoe-highlight", listen);
  }, []);
  return lit;
}

/** best  "min", "max", or "" where neither is better: then both are shown */
export function Legend({ lines, format, best, lit }) {
  const ranked = lines.some((line) => line.min !== undefined);
  const columns = !ranked ? [] : best ? [["best", best]] : [["min", "min"], ["max", "max"]];
  const value = (each) => (each === undefined || each === null ? "–" : format(each));
  const last = (line) => line.last ?? line.values.findLast((each) => each !== null);
  return html`<div class="legend"><table><thead><tr><th class="left"></th><th>last</th>${columns.map(([title]) => html`<th>${title}</th>`)}</tr></thead>
    <tbody>${lines.slice(0, MAX_ROWS).map((line) => html`<tr key=${line.name} class=${line.name === lit ? "lit" : ""}
        onMouseEnter=${() => highlight(line.name)} onMouseLeave=${() => highlight(null)}>
      <td class="left name" title=${line.name}><span class="swatch" style=${{ background: line.colour }}></span>${line.name}</td>
      <td>${value(last(line))}</td>${columns.map(([title, key]) => html`<td>${value(line[key])}</td>`)}</tr>`)}</tbody></table>
    ${lines.length > MAX_ROWS ? html`<p class="soft">and ${lines.length - MAX_ROWS} more</p>` : null}</div>`;
}
