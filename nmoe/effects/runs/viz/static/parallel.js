// Parallel coordinates: an axis a key of the config and one for the result, a line a run; a stretch drawn over an axis
// keeps the runs that pass through it.
import { html, useRef, useState } from "./vendor/preact-htm.mjs";
import { scale } from "./axes.js";
import { hex, number, viridis, visible } from "./format.js";
import { highlight } from "./legend.js";

const TOP = 46, BOTTOM = 22, SIDE = 70, HEIGHT = 330;
const AXES_AT_FIRST = 6;
const AXIS_PX = 110;
const LOG_FROM = 30;
const FEW = 5;
const RESULT = "result";

/**
 * keys     keys of the config that differ
 * values   key -> run -> value
 * runs     those with a result
 * result   run -> number
 * best     "min", "max" or "": which result is drawn brightest
 */
export function Parallel({ state, set, keys, values, runs, result, best, y, lit, width, theme }) {
  const drag = useRef(null);
  const [drawing, setDrawing] = useState(null);
  const [over, setOver] = useState(null);
  const chosen = (state.axis ?? keys.slice(0, AXES_AT_FIRST)).filter((key) => keys.includes(key));
  const W = Math.max(width - 22, 2 * SIDE + AXIS_PX * chosen.length), H = HEIGHT;
  const names = [...chosen, RESULT];
  const left = (place) => SIDE + (place * (W - 2 * SIDE)) / Math.max(1, names.length - 1);
  const axes = names.map((key, place) => ({
    key, x: left(place), title: key === RESULT ? y : key, ...axisOf(runs.map((run) => [run, key === RESULT ? result.get(run) : values.get(key).get(run)]), H),
  }));
  const brushes = drawing ? [...brushesOf(state).filter((each) => each.key !== drawing.key), drawing] : brushesOf(state);
  const kept = runs.filter((run) => brushes.every(({ key, low, high }) => {
    const axis = axes.find((each) => each.key === key);
    if (!axis) return true;
    const at = axis.coordinate.get(run);
    return at !== null && at >= low && at <= high;
  }));
  const write = (next) => set({ brush: next.map(({ key, low, high }) => `${low.toPrecision(6)} ${high.toPrecision(6)} ${key}`) });
  const at = (event, axis) => axis.value(Math.min(H - BOTTOM, Math.max(TOP, event.clientY - event.currentTarget.ownerSVGElement.getBoundingClientRect().top)));
  const down = (event, axis) => { event.currentTarget.setPointerCapture(event.pointerId); drag.current = { from: at(event, axis), drawn: null }; };
  const move = (event, axis) => {
    if (!drag.current) return;
    const [low, high] = [drag.current.from, at(event, axis)].sort((a, b) => a - b);
    drag.current.drawn = { key: axis.key, low, high };
    setDrawing(drag.current.drawn);
  };
  // A click without a stretch takes the axis' own away.
  const up = (axis) => {
    if (!drag.current) return;
    const { drawn } = drag.current, others = brushesOf(state).filter((each) => each.key !== axis.key);
    write(drawn && drawn.high > drawn.low ? [...others, drawn] : others);
    drag.current = null;
    setDrawing(null);
  };
  const shade = colours(runs, result, best, theme);
  const line = (run) => axes.map((axis) => `${axis.x},${axis.place(axis.coordinate.get(run)).toFixed(1)}`).join(" ");
  const said = (run) => `${run}: ${number(result.get(run))}`;
  const light = (run) => { setOver(run); highlight(run); };
  const last = new Set(kept);
  const ordered = [...runs].sort((a, b) => last.has(a) - last.has(b));
  const rest = keys.filter((key) => !chosen.includes(key));
  return html`<figure class="chart wide" aria-label="parallel coordinates"><figcaption><span class="chart-title">${y} by parallel coordinates</span>
      <span class="chart-note" id="kept">${over ? said(over) : brushes.length ? `${kept.length} of ${runs.length} runs` : "draw over an axis to keep the runs that pass there"}</span>
      ${brushes.length ? html`<button class="quiet" onClick=${() => set({ brush: null })}>all runs</button>
        <button class="quiet" disabled=${!kept.length} onClick=${() => set({ run: kept, brush: null })}>choose these ${kept.length}</button>` : null}</figcaption>
    <div class="tools axes">${chosen.map((key) => html`<button key=${key} class="chip" title="leave this axis out" aria-label=${`leave out the axis ${key}`}
        onClick=${() => set({ axis: chosen.length > 1 ? chosen.filter((each) => each !== key) : ["-"] })}>${key} ×</button>`)}
      ${rest.length ? html`<select aria-label="add an axis" value="" onChange=${(event) => { set({ axis: [...chosen, event.target.value] }); event.target.value = ""; }}>
        <option value="">add an axis…</option>${rest.map((key) => html`<option key=${key} value=${key}>${key}</option>`)}</select>` : null}</div>
    <div class="parallel-scroll"><svg class="scatter parallel" width=${W} height=${H} role="img" aria-label=${`${y} of ${runs.length} runs over ${chosen.length} keys of the config`}>
      ${ordered.map((run) => html`<polyline key=${run} points=${line(run)} data-run=${run} data-kept=${last.has(run) ? "1" : "0"}
        class=${last.has(run) ? (lit === run ? "lit" : "") : "out"} stroke=${shade(run)} onMouseEnter=${() => light(run)} onMouseLeave=${() => light(null)}><title>${run}</title></polyline>`)}
      ${axes.map((axis, place) => html`<g key=${axis.key} data-axis=${axis.key}>
        <line class="axis" x1=${axis.x} x2=${axis.x} y1=${TOP} y2=${H - BOTTOM} />
        <text class="name" x=${axis.x} y=${place % 2 ? 14 : 30} text-anchor=${place === 0 ? "start" : place === axes.length - 1 ? "end" : "middle"} dx=${place === 0 ? -SIDE + 4 : place === axes.length - 1 ? SIDE - 4 : 0}>${short(axis.title)}${axis.isLog ? " (log)" : ""}<title>${axis.title}</title></text>
        ${axis.ticks.map(([value, text]) => html`<text x=${place === axes.length - 1 ? axis.x + 7 : axis.x - 7} y=${axis.place(value) + 4} text-anchor=${place === axes.length - 1 ? "start" : "end"}>${short(text, 12)}</text>
          <line x1=${axis.x - 4} x2=${axis.x} y1=${axis.place(value)} y2=${axis.place(value)} />`)}
        ${brushes.filter((each) => each.key === axis.key).map(({ low, high }) => html`<rect class="brush" x=${axis.x - 8} width="16" y=${axis.place(high)} height=${Math.max(2, axis.place(low) - axis.place(high))} />`)}
        <rect class="grab" x=${axis.x - 14} width="28" y=${TOP} height=${H - TOP - BOTTOM} onPointerDown=${(event) => down(event, axis)}
          onPointerMove=${(event) => move(event, axis)} onPointerUp=${() => up(axis)} onPointerCancel=${() => up(axis)} /></g>`)}
    </svg></div></figure>`;
}

/** The stretches that are drawn over axes, as the address has them: low, high and the key. */
function brushesOf(state) {
  return (state.brush ?? []).map((text) => text.match(/^(\S+) (\S+) (.+)$/)).filter(Boolean)
    .map(([, low, high, key]) => ({ key, low: Number(low), high: Number(high) })).filter(({ low, high }) => low <= high);
}

/**
 * An axis: where each run crosses it. Texts stand in order, what a run lacks stands as a dash; numbers of one sign
 * that span more than a factor of `LOG_FROM` stand by their logarithm.
 */
function axisOf(pairs, H) {
  const present = pairs.filter(([, value]) => value !== null && value !== undefined);
  const isNumber = present.length === pairs.length && present.every(([, value]) => typeof value === "number");
  const texts = isNumber ? null : [...new Set(pairs.map(([, value]) => textOf(value)))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  const coordinate = new Map(pairs.map(([run, value]) => [run, texts ? texts.indexOf(textOf(value)) : value]));
  const all = [...coordinate.values()];
  const isLog = isNumber && Math.min(...all) > 0 && Math.max(...all) >= LOG_FROM * Math.min(...all);
  const made = scale(all, isLog, H - BOTTOM, TOP);
  const single = [...new Set(all)].sort((a, b) => a - b);
  const marks = texts ? texts.map((text, place) => [place, text])
    : single.length <= FEW ? single.map((value) => [value, number(value)]) : made.ticks;
  const every = Math.ceil(marks.length / 14);
  return { coordinate, isLog, place: made.place, value: made.value, ticks: marks.filter((_, place) => place % every === 0) };
}

const textOf = (value) => (value === null || value === undefined ? "–" : Array.isArray(value) ? value.join(", ") : String(value));
const short = (text, most = 24) => (text.length > most ? `…${text.slice(1 - most)}` : text);

/** Run -> colour by its result; the best is the furthest from the page's own brightness. */
function colours(runs, result, best, theme) {
  const all = runs.map((run) => result.get(run));
  const low = Math.min(...all), high = Math.max(...all);
  const [from, to] = theme === "dark" ? visible(theme) : visible(theme).reverse();
  return (run) => {
    const share = high > low ? (result.get(run) - low) / (high - low) : 1;
    return hex(viridis(from + (to - from) * (best === "min" ? 1 - share : share)));
  };
}
