// What runs found and what happened to them: evaluations, events, configs, samples.
import { html } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { Lazy, RunChart } from "./charts.js";
import { EVENT_MARK, clock, colour, count, number } from "./format.js";

const Swatch = ({ run, places }) => html`<span class="swatch" style=${{ background: colour(places.get(run) ?? 0) }}></span>`;

export function EvaluationsView(props) {
  const { selected, places, version } = props;
  const { data, problem } = useAnswer("Evaluations", selected.length ? address("evaluations", { run: selected }) : null, version);
  const tags = props.present.filter((tag) => tag.startsWith("validation/") || tag.startsWith("evaluation/"));
  if (!selected.length) return html`<p class="empty">Choose runs in the list.</p>`;
  if (problem) return html`<p class="problem">${problem}</p>`;
  return html`<div class="grid">${tags.map((tag) => html`<${Lazy} key=${tag}><${RunChart} ...${props} tag=${tag} /></${Lazy}>`)}</div>
    ${data ? data.problems.map((each) => html`<p class="problem">${each}</p>`) : null}
    ${data && data.scores.length ? html`<h3>Newest score of each task</h3><div class="scroll"><table id="scores"><thead><tr><th class="left">run</th><th class="left">task</th>
      <th>score</th><th>standard error</th><th>items</th><th>step</th><th>judged (UTC)</th></tr></thead><tbody>${data.scores.map((score) => html`<tr>
      <td class="left name"><${Swatch} run=${score.run} places=${places} />${score.run}</td><td class="left">${score.task}</td><td>${score.value}</td>
      <td>${score.error}</td><td>${score.items}</td><td>${score.step}</td><td>${score.at}</td></tr>`)}</tbody></table></div>` : null}
    ${data && data.scored.length ? html`<h3>Each evaluation <span class="soft">score ± standard error</span></h3><div class="scroll"><table id="scored"><thead><tr>
      <th class="left">run</th><th>step</th>${data.tasks.map((task) => html`<th>${task}</th>`)}<th>time</th></tr></thead>
      <tbody>${data.scored.map((row) => html`<tr><td class="left name"><${Swatch} run=${row.run} places=${places} />${row.run}</td>
        <td>${count(row.step)}${row.attempt > 1 ? html` <span class="soft">↻ ${row.attempt}</span>` : null}</td>
        ${data.tasks.map((task) => html`<td>${withError(row.scores[task])}</td>`)}<td>${clock(row.time)}</td></tr>`)}</tbody></table></div>` : null}
    ${data && !data.rows.length && !data.scores.length && !data.scored.length ? html`<p class="empty">No validation and no evaluation yet.</p>` : null}
    ${data && data.rows.length ? html`<h3>Each validation</h3><div class="scroll"><table id="evaluations"><thead><tr><th class="left">run</th><th>step</th>${data.names.map((name) => html`<th>${name.replaceAll("_", " ")}</th>`)}<th>time</th></tr></thead>
      <tbody>${data.rows.map((row) => html`<tr><td class="left name"><${Swatch} run=${row.run} places=${places} />${row.run}</td><td>${count(row.step)}</td>
        ${data.names.map((name) => html`<td>${plain(row.results[name])}</td>`)}<td>${clock(row.time)}</td></tr>`)}</tbody></table></div>` : null}`;
}

/** A score and its standard error, as texts; of one item there is no error. */
function withError(score) {
  const [value, error] = score ?? [null, null];
  return value !== null && error !== null ? `${number(value)} ± ${number(error)}` : number(value);
}

function plain(value) {
  if (value === undefined || value === null) return "–";
  return typeof value === "object" ? JSON.stringify(value) : Number.isInteger(value) ? count(value) : number(value);
}

export function EventsView({ state, set, selected, places, version }) {
  const { data, problem } = useAnswer("Events", selected.length ? address("events", { run: selected }) : null, version);
  if (!selected.length) return html`<p class="empty">Choose runs in the list.</p>`;
  if (problem) return html`<p class="problem">${problem}</p>`;
  if (!data) return null;
  const kinds = [...new Set(data.events.map((event) => event.event))].sort();
  const shown = data.events.filter((event) => !state.event || event.event === state.event);
  return html`<div class="tools"><label>kind <select aria-label="kind of event" value=${state.event ?? ""} onChange=${(event) => set({ event: event.target.value || null })}>
      <option value="">all</option>${kinds.map((kind) => html`<option key=${kind} value=${kind} selected=${kind === state.event}>${kind}</option>`)}</select></label>
      <span class="soft">${shown.length} ${shown.length === 1 ? "event" : "events"}${data.left_out ? `, ${data.left_out} older ones left out` : ""}</span></div>
    <div class="scroll"><table id="events"><thead><tr><th>time</th><th class="left">run</th><th>step</th><th class="left">event</th><th class="left">what</th></tr></thead>
      <tbody>${shown.map((event) => html`<tr class=${event.severity}><td>${clock(event.time)}</td><td class="left name"><${Swatch} run=${event.run} places=${places} />${event.run}</td>
        <td>${count(event.step)}</td><td class="left">${EVENT_MARK[event.event] ?? "•"} ${event.event.replaceAll("_", " ")}${event.attempt > 1 ? html` <span class="soft">↻ ${event.attempt}</span>` : null}</td>
        <td class="left text">${event.text}</td></tr>`)}</tbody></table></div>`;
}

export function ConfigsView({ state, set, selected }) {
  const { data, problem } = useAnswer("Configs", selected.length ? address("configs", { run: selected.slice(0, 12) }) : null, 0);
  if (!selected.length) return html`<p class="empty">Choose runs in the list; two or more are compared.</p>`;
  if (problem) return html`<p class="problem">${problem}</p>`;
  if (!data) return null;
  const all = data.runs.length < 2 || state.all === "1";
  const rows = data.rows.filter((row) => all || row.differs).filter((row) => row.key.includes(state.key ?? ""));
  return html`<div class="tools">
      ${data.runs.length > 1 ? html`<label><input type="checkbox" checked=${!all} onChange=${() => set({ all: state.all === "1" ? null : "1" })} />differences only</label>` : null}
      <input type="search" placeholder="find keys" aria-label="find keys" value=${state.key ?? ""} onInput=${(event) => set({ key: event.target.value })} />
      <span class="soft">${data.rows.filter((row) => row.differs).length} of ${data.rows.length} keys differ${selected.length > 12 ? "; the first 12 runs are shown" : ""}</span></div>
    ${rows.length ? html`<div class="scroll"><table id="configs" class="configs"><thead><tr><th class="left stay">key</th>${data.runs.map((run) => html`<th class="left" title=${run}>${run}</th>`)}</tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${row.key}><th class="left stay">${parts(row.key)}</th>
        ${row.values.map((value) => html`<td class=${same(value, row.values[0]) ? "left" : "left differs"} title=${shown(value)}>${shown(value)}</td>`)}</tr>`)}</tbody></table></div>`
      : html`<p class="empty">${data.runs.length > 1 && !all ? "These runs have the same config." : "No key is called like this."}</p>`}`;
}

/** A key that a narrow column breaks behind a dot or an underscore, not within a word. */
const parts = (key) => key.split(/(?<=[._])/).map((part, place) => html`${place ? html`<wbr />` : null}<span>${part}</span>`);

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const shown = (value) => (value === null ? "–" : Array.isArray(value) ? value.join(", ") || "none" : String(value));

export function SamplesView({ state, set, selected, places, version }) {
  const { data, problem } = useAnswer("Samples", selected.length ? address("samples", { run: selected }) : null, version);
  if (!selected.length) return html`<p class="empty">Choose runs in the list.</p>`;
  if (problem) return html`<p class="problem">${problem}</p>`;
  if (!data) return null;
  if (!data.samples.length) return html`<p class="empty">These runs have written no samples.</p>`;
  const steps = [...new Set(data.samples.map((sample) => sample.step))].filter((step) => step !== null).sort((a, b) => b - a);
  const wanted = steps.includes(Number(state.at)) ? Number(state.at) : null;
  const samples = data.samples.filter((sample) => wanted === null || sample.step === wanted);
  return html`<div class="tools"><label>step <select aria-label="step of the samples" value=${wanted ?? ""} onChange=${(event) => set({ at: event.target.value || null })}>
      <option value="">all</option>${steps.map((step) => html`<option key=${step} value=${step} selected=${step === wanted}>${step}</option>`)}</select></label></div>
    <div class="samples">${samples.map((sample) => html`<article class="sample"><h3><${Swatch} run=${sample.run} places=${places} />${sample.run} <span class="soft">step ${count(sample.step)}, ${clock(sample.time)}</span></h3>
    <pre><b>${sample.prompt}</b>${sample.text.startsWith(sample.prompt) ? sample.text.slice(sample.prompt.length) : sample.text}</pre></article>`)}</div>`;
}
