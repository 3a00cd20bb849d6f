// Curves of many runs, one request a chart.
import { html, useEffect, useMemo, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { Chart, X_AXES } from "./chart.js";
import { FORMATS, colour, dash } from "./format.js";
import { grouped } from "./groups.js";

const SPANS = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const BANDS_UP_TO = 12;
const SCORE = "evaluation/", ERROR = "evaluation_error/";
const EVENTS = { none: "none", alerts: "alerts", all: "all" };

/** What a chart asks the server for. */
export const axis = (state) => ({
  x: state.x ?? "step", smooth: state.smooth ?? null, log_x: !!state.logx, low: state.low, high: state.high,
});

/** What all charts are drawn by; the axis is that of the answer at `path`, which may be older than the address. */
export const drawing = (state, set, path) => ({
  axis: new URLSearchParams(path.slice(path.indexOf("?"))).get("x"), logX: !!state.logx, logY: !!state.logy, all: !!state.ally,
  onZoom: (low, high) => set({ low: low && Math.max(0, low), high }), onAll: () => set({ ally: "1" }),
});

/** What the server says of a metric. */
export const metricOf = (table, name) => table.metrics.find((metric) => metric.name === name);

/** A switch for a key of the address. */
export function Switch({ state, set, name, children, title }) {
  const change = () => set({ [name]: state[name] ? null : "1" });
  return html`<label title=${title}><input type="checkbox" checked=${!!state[name]} onChange=${change} />${children}</label>`;
}

/** What all charts of a view are drawn by. */
export function AxisTools({ state, set, children }) {
  const x = state.x ?? "step";
  return html`<div class="tools">
    <label>x <select aria-label="x axis" value=${x} onChange=${(event) => set({ x: event.target.value, low: null, high: null })}>
      ${Object.entries(X_AXES).map(([key, [name]]) => html`<option key=${key} value=${key} selected=${key === x}>${name}</option>`)}</select></label>
    <${Switch} state=${state} set=${set} name="logx">log x</${Switch}>
    <${Switch} state=${state} set=${set} name="logy">log y</${Switch}>
    <${Switch} state=${state} set=${set} name="ally" title="the y axis reaches values far from the rest, too">outliers</${Switch}>
    <label>smooth <input type="range" min="0" max=${SPANS.length - 1} aria-label="smoothing in steps"
      value=${SPANS.indexOf(Number(state.smooth ?? 0))} onInput=${(event) => set({ smooth: SPANS[event.target.value] || null })} />
      <span class="fixed">${state.smooth ? `${state.smooth} steps` : "off"}</span></label>
    ${children}
    ${state.low || state.high ? html`<button onClick=${() => set({ low: null, high: null })}>undo zoom</button>` : null}
  </div>`;
}

/** What finds a tag: a regular expression, or several with blanks between; a text that is none stands for itself. */
export function finder(text) {
  const parts = (text ?? "").split(/[\s,]+/).filter(Boolean).map(expression);
  return (tag) => !parts.length || parts.some((part) => part.test(tag));
}

function expression(text) {
  try {
    return new RegExp(text, "i");
  } catch (error) {
    if (error instanceof SyntaxError) return new RegExp(text.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&"), "i");
    throw error;
  }
}

/** Tags by the part before their first slash. */
function sections(tags) {
  const named = new Map();
  for (const tag of tags) {
    const name = tag.includes("/") ? tag.slice(0, tag.indexOf("/")) : "training";
    named.set(name, [...(named.get(name) ?? []), tag]);
  }
  return [...named];
}

export function ChartsView(props) {
  const { state, set, table, selected, version, present } = props;
  const tags = present.filter((tag) => !tag.startsWith(ERROR)).filter(finder(state.tags));
  const kind = EVENTS[state.events] ?? "alerts";
  const marked = selected.length && selected.length <= BANDS_UP_TO && kind !== "none";
  const path = address("events", { run: selected, x: state.x, alerts: kind === "alerts" });
  const happened = useAnswer("Events", marked ? path : null, version);
  if (!selected.length) return html`<p class="empty">Choose runs in the list.</p>`;
  const events = marked && happened.data ? happened.data.events : null;
  const chart = (tag) => html`<${Lazy} key=${tag}><${RunChart} ...${props} tag=${tag} events=${events} /></${Lazy}>`;
  const closed = state.closed ?? [];
  const fold = (name, open) => set({ closed: open ? closed.filter((each) => each !== name) : [...new Set([...closed, name])] });
  return html`<${AxisTools} state=${state} set=${set}>
      <${Switch} state=${state} set=${set} name="nobands" title="hide the lowest and highest value of each cell">no min/max</${Switch}>
      <label>events <select aria-label="events in charts" value=${kind}
          onChange=${({ target }) => set({ events: target.value === "alerts" ? null : target.value })}>
        ${Object.keys(EVENTS).map((each) => html`<option key=${each} value=${each} selected=${each === kind}>${each}</option>`)}</select></label>
      <${GroupBy} state=${state} set=${set} table=${table} />
      <input type="search" placeholder="loss|norm, ^time" aria-label="find metrics" title="a regular expression; several with blanks between"
        value=${state.tags ?? ""} onInput=${(event) => set({ tags: event.target.value })} />
      <span class="exports">export <a href=${address("export", { run: selected, format: "csv" })} download>CSV</a>
        <a href=${address("export", { run: selected, format: "parquet" })} download>Parquet</a></span>
    </${AxisTools}>
    ${happened.problem ? html`<p class="problem">${happened.problem}</p>` : null}
    ${tags.length ? null : html`<p class="empty">${present.length ? "No metric of these runs is called like this." : "These runs have logged no step yet."}</p>`}
    ${sections(tags).map(([name, own]) => html`<details key=${name} class="section" open=${!closed.includes(name)}
        onToggle=${(event) => event.target.open === closed.includes(name) && fold(name, event.target.open)}>
      <summary>${name} <span class="soft">${own.length}</span></summary>
      <div class="grid">${closed.includes(name) ? null : own.map(chart)}</div>
    </details>`)}`;
}

/** The key of the configs that runs are put together by. */
export function GroupBy({ state, set, table }) {
  return html`<label>group by <select aria-label="group by" value=${state.group ?? ""} onChange=${(event) => set({ group: event.target.value || null })}>
    <option value="">nothing</option><option value="status" selected=${state.group === "status"}>status</option>
    ${table.keys.map((key) => html`<option key=${key} value=${key} selected=${key === state.group}>${key}</option>`)}</select></label>`;
}

/** The group of a run. */
export const groupOf = (state, run) => (state.group === "status" ? run.status : run.columns[state.group] ?? "–");

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

/** One tag of some runs, or of groups of them. */
export function RunChart({ state, set, table, runs, selected, places, present, tag, title, events, version, theme }) {
  const plain = !!state.nobands || selected.length > BANDS_UP_TO;
  const path = address("series", { run: selected, tag, ...axis(state), bands: plain || state.group ? "0" : null });
  const { data, problem, path: answered } = useAnswer("Series", path, version);
  const error = tag.startsWith(SCORE) && !plain && !state.group ? tag.replace(SCORE, ERROR) : null;
  const errorPath = present.includes(error) ? address("series", { run: selected, tag: error, ...axis(state), smooth: null, bands: "0" }) : null;
  const errors = useAnswer("Series", errorPath, version).data;
  const groups = state.group ? JSON.stringify(runs.map((run) => groupOf(state, run))) : "";
  const made = () => (data ? linesOf(state, data, { runs, selected, places, plain, errors: error ? errors : null }) : []);
  const lines = useMemo(made, [data, errors, places, plain, state.smooth, theme, state.group, groups]);
  const name = title ?? tag;
  if (problem) return html`<figure class="chart"><figcaption>${name}</figcaption><p class="problem">${problem}</p></figure>`;
  if (!data) return html`<figure class="chart waiting"><figcaption>${name}</figcaption></figure>`;
  if (!lines.length) {
    const why = state.x === "flops" ? "no FLOPs a token in these runs" : "in none of these runs";
    return html`<p class="none"><b>${name}</b> ${why}</p>`;
  }
  const metric = metricOf(table, tag);
  const about = `${tag}${metric?.doc ? `: ${metric.doc}` : ""}${data.without.length ? `; not in ${data.without.slice(0, 5).join(", ")}` : ""}`;
  const format = FORMATS[metric?.format ?? "number"];
  return html`<${Chart} title=${name} unit=${unitOf(metric)} about=${about} x=${data.x} lines=${lines} events=${events} format=${format}
    best=${metric?.best ?? ""} least=${metric?.kind === "time" ? 0.1 : 0} theme=${theme} ...${drawing(state, set, answered)}
    full=${state.full === tag} onFull=${(full) => set({ full: full ? tag : null })} />`;
}

/** What a unit adds to the numbers: a metric in percent or without a unit has none, bytes are in its ticks. */
export function unitOf(metric) {
  if (!metric || metric.unit === "1" || metric.format === "percent") return "";
  return metric.format === "bytes" ? { "B/s": "per second", "B/step": "per step" }[metric.unit] ?? "" : metric.unit;
}

/** Lines of a chart; scores have their standard error to both sides as the band, metrics the lowest and highest value. */
function linesOf(state, data, { runs, selected, places, plain, errors }) {
  const smoothed = !!state.smooth;
  if (state.group) {
    const group = new Map(runs.map((run) => [run.name, String(groupOf(state, run))]));
    return grouped(data.curves, (curve) => group.get(curve.run), smoothed).map((line, place) => ({
      ...line, name: `${state.group} = ${line.name}`, colour: colour(place), dash: dash(place),
    }));
  }
  return data.curves.map((curve) => ({
    name: curve.run, colour: colour(places.get(curve.run) ?? 0), dash: dash(places.get(curve.run) ?? 0),
    nonfinite: curve.nonfinite, last: curve.last, min: curve.min, max: curve.max,
    values: smoothed ? curve.smooth : curve.mean,
    ...(plain ? {} : errors ? aroundScore(curve, data.x, errors) : { low: curve.low, high: curve.high }),
    ...(smoothed && selected.length <= BANDS_UP_TO ? { under: curve.mean } : {}),
  }));
}

/** A score less and plus its standard error, where both are logged; the last error. */
export function aroundScore(curve, x, errors) {
  const places = new Map(errors.x.map((at, place) => [at, place]));
  const own = errors.curves.find((each) => each.run === curve.run);
  const error = x.map((at) => (own && places.has(at) ? own.mean[places.get(at)] : null));
  const aside = (sign) => curve.mean.map((value, place) => (value === null || error[place] === null ? null : value + sign * error[place]));
  return { low: aside(-1), high: aside(1), error: error.findLast((each) => each !== null) ?? null };
}
