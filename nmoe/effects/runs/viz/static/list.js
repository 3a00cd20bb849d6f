// The list of runs beside the views; in the view of runs the table is the list.
import { html } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { EVENT_MARK, STATUS, clock, colour } from "./format.js";
import { highlight } from "./legend.js";

/** The word of a status, as a class of the page. */
export const statusClass = (run) => `status ${run.status.split(",")[0].replace(" ", "-")}`;

/** Finds runs, and chooses many at once. */
export function ListTools({ state, set, table, runs, selected, shown, filter }) {
  const hidden = (table?.runs ?? []).filter((run) => run.notes.hidden).length;
  return html`<input type="search" ref=${filter} placeholder="find runs  ( / )" aria-label="find runs" value=${state.find ?? ""}
      onInput=${(event) => set({ find: event.target.value })} />
    <div class="list-tools">
      <button class="quiet" onClick=${() => set({ run: state.find ? shown.map((run) => run.name) : ["*"] })}>show all</button>
      <button class="quiet" onClick=${() => set({ run: ["-"] })}>none</button>
      <button class="quiet" onClick=${() => set({ run: null })}>newest</button>
      ${hidden ? html`<button class="quiet" aria-pressed=${!!state.hidden} title=${state.hidden ? "leave the hidden runs out" : "show the hidden runs, too"}
        onClick=${() => set({ hidden: state.hidden ? null : "1" })}>${hidden} hidden</button>` : null}
      <span>${selected.length} of ${runs.length}</span>
    </div>`;
}

/** Whether a run is looked for: by its name, its status, its notes, and what its columns of choice hold. */
export function finding(text) {
  const wanted = (text ?? "").toLowerCase();
  return (run) => `${run.name} ${run.status} ${run.notes.tags.join(" ")} ${run.notes.note} ${Object.values(run.columns).join(" ")}`.toLowerCase().includes(wanted);
}

export function RunList(props) {
  const { state, set, runs, selected, places, toggle } = props;
  const shown = runs.filter(finding(state.find));
  return html`<${ListTools} ...${props} shown=${shown} />
    <ul>${shown.map((run) => html`<li key=${run.name} onMouseEnter=${() => highlight(run.name)} onMouseLeave=${() => highlight(null)}>
      <label title=${`${run.name}: ${run.status}`}><input type="checkbox" checked=${selected.includes(run.name)} onChange=${() => toggle(run.name)} />
        <${Swatch} run=${run.name} selected=${selected} places=${places} />
        <span class="run-name">${run.name}</span>
        <span class=${statusClass(run)} aria-label=${run.status}>${STATUS[run.status] ?? "?"}</span>
      </label>
      <button class="quiet only" title="show this one alone" onClick=${() => set({ run: [run.name] })}>only</button></li>`)}
    </ul>`;
}

/** The colour of a run's curves; none while it is not shown. */
export function Swatch({ run, selected, places }) {
  return html`<span class="swatch" style=${{ background: selected.includes(run) ? colour(places.get(run)) : "transparent" }}></span>`;
}

/** What someone should look at, of all runs, newest first. */
export function AlertsPanel({ set, runs, version, close }) {
  const names = runs.filter((run) => run.alerts || run.nonfinite || ["failed", "crashed"].includes(run.status)).map((run) => run.name);
  const { data, problem } = useAnswer("Events", names.length ? address("events", { run: names.slice(0, 100), alerts: true }) : null, version);
  const events = data && names.length ? data.events.slice(0, 50) : [];
  const open = (event) => set({ run: [event.run], view: "charts", low: null, high: null });
  return html`<div class="panel alerts" role="dialog" aria-label="alerts">
    <h3>Alerts <button class="quiet" aria-label="close the alerts" onClick=${close}>×</button></h3>
    ${problem ? html`<p class="problem">${problem}</p>` : null}
    ${events.length ? null : html`<p class="soft">No alert in any run.</p>`}
    ${events.map((event) => html`<button class=${`alert-row ${event.severity}`} onClick=${() => open(event)}>
      <b>${EVENT_MARK[event.event] ?? "•"} ${event.run}</b> <span class="soft">${event.step === null ? "" : `step ${event.step}, `}${clock(event.time)}</span>
      <span class="alert-text">${event.text}</span></button>`)}</div>`;
}

/** How many things of all runs someone should look at. */
export const alertCount = (runs) => runs.reduce((sum, run) => sum + run.alerts + (run.nonfinite ? 1 : 0), 0);
