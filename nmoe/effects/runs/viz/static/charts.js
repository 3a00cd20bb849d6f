// Curves of many runs, one request a chart.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { Chart } from "./chart.js";
import { FORMATS, colour, dash, number } from "./format.js";

export const X_NAMES = { step: "step", tokens: "tokens", time: "hours", flops: "FLOPs" };
const SPANS = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const BANDS_UP_TO = 12;

export const axis = (state) => ({
  x: state.x ?? "step", smooth: state.smooth ?? null, log_x: !!state.logx, low: state.low, high: state.high,
});

/** What the server says of a metric. */
export const metricOf = (table, name) => table.metrics.find((metric) => metric.name === name);

/** What all charts of a view are drawn by. */
export function AxisTools({ state, set, children }) {
  const flag = (key, title) => html`<label><input type="checkbox" checked=${!!state[key]} onChange=${() => set({ [key]: state[key] ? null : "1" })} />${title}</label>`;
  return html`<div class="tools">
    <label>x <select aria-label="x axis" value=${state.x ?? "step"} onChange=${(event) => set({ x: event.target.value, low: null, high: null })}>
      ${Object.entries(X_NAMES).map(([key, name]) => html`<option value=${key} selected=${key === (state.x ?? "step")}>${name}</option>`)}</select></label>
    ${flag("logx", "log x")}${flag("logy", "log y")}
    <label>smooth <input type="range" min="0" max=${SPANS.length - 1} aria-label="smoothing in steps" value=${SPANS.indexOf(Number(state.smooth ?? 0))}
      onInput=${(event) => set({ smooth: SPANS[event.target.value] || null })} /> <span class="fixed">${state.smooth ? `${state.smooth} steps` : "off"}</span></label>
    ${children}
    ${state.low || state.high ? html`<button onClick=${() => set({ low: null, high: null })}>undo zoom</button>` : null}
  </div>`;
}

export function ChartsView(props) {
  const { state, set, table, selected, version } = props;
  const wanted = (state.tags ?? "").toLowerCase().split(/[\s,]+/).filter(Boolean);
  const tags = table.tags.filter((tag) => !wanted.length || wanted.some((part) => tag.toLowerCase().includes(part)));
  const happened = useAnswer("Events", selected.length && !state.noevents ? address("events", { run: selected, x: state.x }) : null, version);
  const events = state.noevents || !happened.data ? [] : happened.data.events;
  if (!selected.length) return html`<p class="empty">Choose runs in the list.</p>`;
  return html`<${AxisTools} state=${state} set=${set}>
      <label><input type="checkbox" checked=${!state.nobands} onChange=${() => set({ nobands: state.nobands ? null : "1" })} />min/max</label>
      <label><input type="checkbox" checked=${!state.noevents} onChange=${() => set({ noevents: state.noevents ? null : "1" })} />events</label>
      <input type="search" placeholder="tags, such as loss norm" aria-label="find tags" value=${state.tags ?? ""} onInput=${(event) => set({ tags: event.target.value })} />
      <span class="exports">export <a href=${address("export", { run: selected, format: "csv" })} download>CSV</a>
        <a href=${address("export", { run: selected, format: "parquet" })} download>Parquet</a></span>
    </${AxisTools}>
    ${happened.problem ? html`<p class="problem">${happened.problem}</p>` : null}
    <div class="grid">${tags.map((tag) => html`<${Lazy} key=${tag}><${RunChart} ...${props} tag=${tag} events=${selected.length <= BANDS_UP_TO ? events : []} /></${Lazy}>`)}</div>`;
}

/** Draws its children only once they come near the screen. */
export function Lazy({ children }) {
  const place = useRef(null);
  const [near, setNear] = useState(false);
  useEffect(() => {
    const watcher = new IntersectionObserver((seen) => { if (seen.some((each) => each.isIntersecting)) setNear(true); }, { rootMargin: "200px" });
    watcher.observe(place.current);
    return () => watcher.disconnect();
  }, []);
  return html`<div class="lazy" ref=${place}>${near ? children : null}</div>`;
}

/** One tag of some runs. */
export function RunChart({ state, set, table, selected, places, tag, title, events, version, theme }) {
  const { data, problem } = useAnswer("Series", address("series", { run: selected, tag, ...axis(state), bands: state.nobands || selected.length > BANDS_UP_TO ? "0" : null }), version);
  if (problem) return html`<figure class="chart"><figcaption>${tag}</figcaption><p class="problem">${problem}</p></figure>`;
  if (!data) return html`<figure class="chart waiting"><figcaption>${tag}</figcaption></figure>`;
  const smoothed = !!state.smooth;
  const lines = data.curves.map((curve) => ({
    name: curve.run, colour: colour(places.get(curve.run) ?? 0), dash: dash(places.get(curve.run) ?? 0), nonfinite: curve.nonfinite, last: curve.last,
    values: smoothed ? curve.smooth : curve.mean,
    ...(state.nobands || selected.length > BANDS_UP_TO ? {} : { low: curve.low, high: curve.high }),
    ...(smoothed && selected.length <= BANDS_UP_TO ? { under: curve.mean } : {}),
  }));
  if (!lines.length) {
    return html`<figure class="chart none"><figcaption><span class="chart-title">${title ?? tag}</span></figcaption>
      <p class="empty">${state.x === "flops" ? "No run here tells its FLOPs a token." : "No run here has this."}</p></figure>`;
  }
  const about = data.without.length ? `${tag}; not in ${data.without.slice(0, 5).join(", ")}` : tag;
  return html`<${Chart} title=${title ?? tag} about=${about} x=${data.x} lines=${lines} events=${events ?? []} logX=${!!state.logx} logY=${!!state.logy}
    xName=${X_NAMES[state.x ?? "step"]} format=${FORMATS[metricOf(table, tag)?.format ?? "number"]} sync=${state.x ?? "step"} theme=${theme}
    onZoom=${(low, high) => set({ low: low && Math.max(0, low), high })} />`;
}
