// The table of runs: sorted, filtered, grouped, with columns of choice.
import { html } from "./vendor/preact-htm.mjs";
import { FORMATS, STATUS, clock, colour, count, number, percent } from "./format.js";

export function RunsView({ state, set, table, runs, selected, places, toggle }) {
  const extra = state.col ?? [];
  const wanted = (state.find ?? "").toLowerCase();
  const [by, down] = [state.sort ?? "started", state.dir !== "up"];
  const value = (run, key) => (key.startsWith("+") ? run.columns[key.slice(1)] : run[key]);
  const shown = runs.filter((run) => `${run.name} ${run.status} ${Object.values(run.columns).join(" ")}`.toLowerCase().includes(wanted));
  const ordered = [...shown].sort((a, b) => compare(value(a, by), value(b, by)) * (down ? -1 : 1));
  const groups = state.group ? grouped(ordered, (run) => (state.group === "status" ? run.status : run.columns[state.group])) : [[null, ordered]];
  const sort = (key) => set({ sort: key, dir: by === key && down ? "up" : null });
  const head = (key, title, kind = "") => html`<th class=${kind} aria-sort=${by === key ? (down ? "descending" : "ascending") : null}>
    <button class="quiet" onClick=${() => sort(key)}>${title}${by === key ? (down ? " ↓" : " ↑") : ""}</button></th>`;
  const choices = [...table.keys, ...table.tags].filter((key) => !extra.includes(key));
  return html`<div class="tools">
      <label>column <select aria-label="add a column" value="" onChange=${(event) => { set({ col: [...extra, event.target.value] }); event.target.value = ""; }}>
        <option value="">add…</option>${choices.map((key) => html`<option key=${key} value=${key}>${key}</option>`)}</select></label>
      <label>group by <select aria-label="group by" value=${state.group ?? ""} onChange=${(event) => set({ group: event.target.value || null })}>
        <option value="">nothing</option><option value="status" selected=${state.group === "status"}>status</option>
        ${table.keys.map((key) => html`<option key=${key} value=${key} selected=${key === state.group}>${key}</option>`)}</select></label>
      <span class="soft">${shown.length} runs in ${table.root}</span>
    </div>
    <div class="scroll"><table class="runs">
      <thead><tr><th></th>${head("name", "run", "left")}${head("status", "status", "left")}${head("step", "step")}
        ${table.shown.map((column) => head(column.name, column.title))}${head("alerts", "alerts")}
        ${extra.map((key) => html`<th class="extra">${by === `+${key}` ? (down ? "↓" : "↑") : ""}<button class="quiet" onClick=${() => sort(`+${key}`)}>${key}</button>
          <button class="quiet" aria-label=${`remove column ${key}`} onClick=${() => set({ col: extra.filter((each) => each !== key) })}>×</button></th>`)}</tr></thead>
      ${groups.map(([name, members]) => html`<tbody>
        ${state.group ? html`<tr class="group"><th colspan=${14 + extra.length}>${state.group} = ${String(name)} <span class="soft">${members.length}</span></th></tr>` : null}
        ${members.map((run) => html`<tr key=${run.name} class=${selected.includes(run.name) ? "chosen" : ""}>
          <td><input type="checkbox" aria-label=${`show ${run.name}`} checked=${selected.includes(run.name)} onChange=${() => toggle(run.name)} /></td>
          <td class="left name"><span class="swatch" style=${{ background: selected.includes(run.name) ? colour(places.get(run.name)) : "transparent" }}></span>
            <a href="#" onClick=${(event) => { event.preventDefault(); set({ run: [run.name], view: "charts" }); }}>${run.name}</a></td>
          <td class="left"><span class=${`status ${run.status.split(",")[0].replace(" ", "-")}`}>${STATUS[run.status] ?? "?"} ${run.status}</span>
            ${run.attempt > 1 ? html` <span class="soft" title="attempts">↻ ${run.attempt}</span>` : null}</td>
          <td><${Progress} step=${run.step} steps=${run.steps} /></td>
          ${table.shown.map(({ name: key, format }) => html`<td class=${typeof run[key] === "string" ? "bad" : ""} title=${format === "ago" ? clock(run[key]) : null}>${FORMATS[format](run[key])}</td>`)}
          <td>${run.nonfinite ? html`<span class="bad" title="steps that were not finite">✕ ${run.nonfinite} </span>` : null}
            ${run.alerts ? html`<span class="warn" title="alerts">! ${run.alerts}</span>` : null}
            ${run.bad_lines ? html`<span class="bad" title="lines of its files that are no JSON">${run.bad_lines} bad lines</span>` : null}</td>
          ${extra.map((key) => html`<td>${show(run.columns[key])}</td>`)}
        </tr>`)}</tbody>`)}
    </table></div>`;
}

function Progress({ step, steps }) {
  const share = steps ? Math.min(1, (step ?? 0) / steps) : 0;
  return html`<span class="bar" title=${percent(share)}><span style=${{ width: `${100 * share}%` }}></span></span>
    <span class="bar-text">${count(step)} / ${count(steps)}</span>`;
}

function show(value) {
  if (Array.isArray(value)) return value.join(", ");
  return typeof value === "number" ? number(value) : value === null || value === undefined ? "–" : String(value);
}

/** Numbers before texts before nothing. */
function compare(a, b) {
  const kind = (value) => (value === null || value === undefined ? 0 : typeof value === "number" ? 2 : 1);
  if (kind(a) !== kind(b)) return kind(a) - kind(b);
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}

function grouped(runs, key) {
  const groups = new Map();
  for (const run of runs) {
    const name = key(run) ?? "–";
    groups.set(name, [...(groups.get(name) ?? []), run]);
  }
  return [...groups].sort((a, b) => compare(a[0], b[0]));
}
