// A result of each run against keys of its config: what a sweep is made for.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { scale } from "./axes.js";
import { Switch } from "./charts.js";
import { colour, number } from "./format.js";
import { highlight, useHighlight } from "./legend.js";
import { Parallel } from "./parallel.js";

const LEFT = 64, RIGHT = 20, TOP = 16, BOTTOM = 48;

export function CompareView({ state, set, table, runs, selected, places, theme }) {
  const lit = useHighlight();
  const asked = selected.length ? address("configs", { run: selected, differs: true }) : null;
  const { data, problem } = useAnswer("Configs", asked, 0);
  const results = [...table.shown.filter((column) => column.format !== "ago").map((column) => column.name), ...table.tags];
  const y = results.includes(state.cy) ? state.cy : table.shown.find((column) => column.best)?.name;
  if (!selected.length) return html`<p class="empty">Choose runs in the list; two or more are compared.</p>`;
  if (problem) return html`<p class="problem">${problem}</p>`;
  if (!data) return null;
  const own = new Set(table.shown.map((column) => column.name));
  const result = new Map(runs.map((run) => [run.name, own.has(y) ? run[y] : run.columns[y]]));
  const rows = data.rows.filter((row) => !row.key.startsWith("provenance.") && row.key !== "run.name");
  const keys = rows.map((row) => row.key);
  const varied = keys.includes(state.cx) ? state.cx : mostVaried(rows);
  const values = new Map(rows.map((row) => [row.key, new Map(row.values.map((value, place) => [data.runs[place], value]))]));
  const measured = data.runs.filter((run) => selected.includes(run) && typeof result.get(run) === "number");
  const points = measured.map((run) => ({ run, x: values.get(varied)?.get(run) ?? null, y: result.get(run) })).filter((point) => point.x !== null);
  const choose = (name, label, all, now) => html`<label>${label} <select aria-label=${label} value=${now ?? ""}
      onChange=${(event) => set({ [name]: event.target.value || null })}>
    ${all.map((key) => html`<option key=${key} value=${key} selected=${key === now}>${titleOf(table, key)}</option>`)}</select></label>`;
  if (!keys.length) return html`<p class="empty">${data.runs.length > 1 ? "These runs have the same config." : "One run: choose another to compare it with."}</p>`;
  const best = table.shown.find((column) => column.name === y)?.best ?? table.metrics.find((metric) => metric.name === y)?.best ?? "";
  const shared = { lit, y: titleOf(table, y) };
  return html`<div class="tools">${choose("cy", "result", results, y)}${choose("cx", "against", keys, varied)}
      <${Switch} state=${state} set=${set} name="logx">log x</${Switch}><${Switch} state=${state} set=${set} name="logy">log y</${Switch}>
      <span class="soft">${points.length} of ${selected.length} runs</span></div>
    ${points.length ? html`<${Sized}>${(width) => html`<${Scatter} ...${shared} points=${points} places=${places} x=${varied} width=${width} logX=${!!state.logx} logY=${!!state.logy} />`}</${Sized}>
      <${Sized}>${(width) => html`<${Parallel} ...${shared} state=${state} set=${set} keys=${keys} values=${values} runs=${measured} result=${result} best=${best} width=${width} theme=${theme} />`}</${Sized}>`
      : html`<p class="empty">None of the chosen runs has both.</p>`}`;
}

const titleOf = (table, name) => table.shown.find((column) => column.name === name)?.title ?? name;

/** The key with most values, one of numbers where there is one. */
function mostVaried(rows) {
  const rank = (row) => (row.values.every((value) => typeof value === "number") ? 1000 : 0) + new Set(row.values.map(String)).size;
  return rows.reduce((best, row) => (best && rank(best) >= rank(row) ? best : row), null)?.key;
}

/** Its child is a function of the width there is for it in pixels. */
function Sized({ children }) {
  const place = useRef(null);
  const [width, setWidth] = useState(null);
  useEffect(() => {
    const watcher = new ResizeObserver(() => setWidth(place.current.clientWidth));
    watcher.observe(place.current);
    return () => watcher.disconnect();
  }, []);
  return html`<div ref=${place}>${width ? children(width) : null}</div>`;
}

/** Points with a name each; texts on the horizontal axis have places of their own. */
function Scatter({ points, places, lit, x, y, width, logX, logY }) {
  const [over, setOver] = useState(null);
  const W = width - 22, H = Math.max(240, Math.min(340, W / 2));
  const isNumber = points.every((point) => typeof point.x === "number");
  const names = isNumber ? null : [...new Set(points.map((point) => String(point.x)))].sort();
  const across = scale(points.map((point) => (names ? names.indexOf(String(point.x)) : point.x)), logX && !names, LEFT, W - RIGHT);
  const up = scale(points.map((point) => point.y), logY, H - BOTTOM, TOP);
  const left = (point) => across.place(names ? names.indexOf(String(point.x)) : point.x);
  const xTicks = names ? names.map((name, place) => [place, name]) : across.ticks;
  const said = (point) => `${point.run}: ${typeof point.x === "number" ? number(point.x) : point.x}, ${number(point.y)}`;
  const light = (point) => { setOver(point); highlight(point?.run ?? null); };
  return html`<figure class="chart wide" aria-label=${`${y} against ${x}`}><figcaption><span class="chart-title">${y} against ${x}</span>
      <span class="chart-note">${over ? said(over) : ""}</span></figcaption>
    <svg class="scatter" width=${W} height=${H} role="img" aria-label=${`${y} of ${points.length} runs against ${x}`}>
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
