// A result of each run against a key of its config: what a sweep is made for.
import { html, useState } from "./vendor/preact-htm.mjs";
import { around, ticks } from "./axes.js";
import { Switch } from "./charts.js";
import { colour, number } from "./format.js";
import { highlight, useHighlight } from "./legend.js";

const LEFT = 64, RIGHT = 20, TOP = 16, BOTTOM = 48;

export function CompareView({ state, set, table, runs, selected, places }) {
  const lit = useHighlight();
  const results = [...table.shown.filter((column) => column.format !== "ago").map((column) => column.name), ...table.tags];
  const y = results.includes(state.cy) ? state.cy : table.shown.find((column) => column.best)?.name;
  const own = new Set(table.shown.map((column) => column.name));
  const value = (run, key) => (own.has(key) ? run[key] : run.columns[key]);
  const shown = runs.filter((run) => selected.includes(run.name));
  const varied = table.keys.includes(state.cx) ? state.cx : null;
  const points = varied === null ? [] : shown.map((run) => ({ run: run.name, x: value(run, varied), y: value(run, y) }))
    .filter((point) => typeof point.y === "number" && point.x !== null && point.x !== undefined);
  const option = (key, now) => html`<option key=${key} value=${key} selected=${key === now}>${titleOf(table, key)}</option>`;
  const choose = (name, label, all, now) => html`<label>${label} <select aria-label=${label} value=${now ?? ""}
      onChange=${(event) => set({ [name]: event.target.value || null })}>
    ${now === null ? html`<option value="">a key of the config…</option>` : null}${all.map((key) => option(key, now))}</select></label>`;
  return html`<div class="tools">${choose("cy", "result", results, y)}${choose("cx", "against", table.keys, varied)}
      <${Switch} state=${state} set=${set} name="logx">log x</${Switch}><${Switch} state=${state} set=${set} name="logy">log y</${Switch}>
      <span class="soft">${points.length} of ${shown.length} runs</span></div>
    ${points.length ? html`<${Scatter} ...${{ points, places, lit, x: varied, y: titleOf(table, y), logX: !!state.logx, logY: !!state.logy }} />`
      : html`<p class="empty">${varied === null ? "Choose the key that the runs differ in." : "None of the chosen runs has both."}</p>`}`;
}

const titleOf = (table, name) => table.shown.find((column) => column.name === name)?.title ?? name;

/** Points with a name each; texts on the horizontal axis have places of their own. */
function Scatter({ points, places, lit, x, y, logX, logY }) {
  const [over, setOver] = useState(null);
  const W = Math.min(860, innerWidth - 44), H = Math.max(260, W / 2);
  const isNumber = points.every((point) => typeof point.x === "number");
  const names = isNumber ? null : [...new Set(points.map((point) => String(point.x)))].sort();
  const across = scale(points.map((point) => (names ? names.indexOf(String(point.x)) : point.x)), logX && !names, LEFT, W - RIGHT);
  const up = scale(points.map((point) => point.y), logY, H - BOTTOM, TOP);
  const left = (point) => across.place(names ? names.indexOf(String(point.x)) : point.x);
  const xTicks = names ? names.map((name, place) => [place, name]) : across.ticks;
  const said = (point) => `${point.run}: ${typeof point.x === "number" ? number(point.x) : point.x}, ${number(point.y)}`;
  const light = (point) => { setOver(point); highlight(point?.run ?? null); };
  return html`<figure class="chart wide"><figcaption><span class="chart-title">${y} against ${x}</span>
      <span class="chart-note">${over ? said(over) : ""}</span></figcaption>
    <svg class="scatter" viewBox=${`0 0 ${W} ${H}`} role="img" aria-label=${`${y} of ${points.length} runs against ${x}`}>
      ${up.ticks.map(([at, text]) => html`<line x1=${LEFT} x2=${W - RIGHT} y1=${up.place(at)} y2=${up.place(at)} />
        <text x=${LEFT - 8} y=${up.place(at) + 4} text-anchor="end">${text}</text>`)}
      ${xTicks.map(([at, text]) => html`<line x1=${across.place(at)} x2=${across.place(at)} y1=${TOP} y2=${H - BOTTOM} />
        <text x=${across.place(at)} y=${H - BOTTOM + 18} text-anchor="middle">${text}</text>`)}
      <text x=${(LEFT + W - RIGHT) / 2} y=${H - 8} text-anchor="middle">${x}</text>
      ${points.map((point) => html`<circle key=${point.run} cx=${left(point)} cy=${up.place(point.y)} r=${lit === point.run ? 8 : 5.5}
        fill=${colour(places.get(point.run) ?? 0)} data-run=${point.run} onMouseEnter=${() => light(point)}
        onMouseLeave=${() => light(null)}><title>${point.run}</title></circle>`)}
    </svg></figure>`;
}

/** Where values lie between two ends of the picture, and about five ticks; on a logarithm only if all are positive. */
function scale(values, log, from, to) {
  const useLog = log && values.every((value) => value > 0);
  const to01 = useLog ? Math.log10 : (value) => value;
  const [bottom, top] = around(Math.min(...values.map(to01)), Math.max(...values.map(to01)), useLog ? 0 : 0.02);
  const place = (value) => from + ((to01(value) - bottom) / (top - bottom || 1)) * (to - from);
  if (useLog) {
    const all = [...Array(Math.floor(top) - Math.ceil(bottom) + 1).keys()].map((power) => 10 ** (Math.ceil(bottom) + power));
    const marks = all.length > 1 ? all : [...new Set(values)].sort((a, b) => a - b);
    return { place, ticks: marks.map((value) => [value, number(value)]) };
  }
  const step = niceStep((top - bottom) / 5);
  const marks = [...Array(Math.floor(top / step) - Math.ceil(bottom / step) + 1).keys()].map((at) => (Math.ceil(bottom / step) + at) * step);
  const texts = ticks(marks, true, number);
  return { place, ticks: marks.map((value, at) => [value, texts[at]]) };
}

/** 1, 2 or 5 times a power of ten, next above `step`. */
function niceStep(step) {
  const power = 10 ** Math.floor(Math.log10(step || 1));
  return power * [1, 2, 5, 10].find((times) => times * power >= step * 0.999);
}
