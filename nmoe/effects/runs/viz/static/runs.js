// The table of runs: sorted, filtered, grouped, with columns of choice.
import { html, useState } from "./vendor/preact-htm.mjs";
import { GroupBy, groupOf } from "./charts.js";
import { FORMATS, STATUS, clock, count, number, percent } from "./format.js";
import { highlight } from "./legend.js";
import { HideButton, NotesCell, NotesEditor } from "./notes.js";
import { ListTools, Swatch, finding, statusClass } from "./list.js";

export function RunsView(props) {
  const { state, set, table, runs, selected, places, toggle, saved } = props;
  const [edited, setEdited] = useState(null);
  const editing = runs.find((run) => run.name === edited);
  const extra = state.col ?? [];
  const [by, down] = [state.sort ?? "started", state.dir !== "up"];
  const value = (run, key) => (key.startsWith("+") ? run.columns[key.slice(1)] : run[key]);
  const shown = runs.filter(finding(state.find));
  const ordered = [...shown].sort((a, b) => compare(value(a, by), value(b, by), down));
  const groups = state.group ? grouped(ordered, (run) => groupOf(state, run)) : [[null, ordered]];
  // The best comes first: where less is better, and for names, the first click sorts upwards.
  const sort = (key, upwards) => set({ sort: key, dir: by === key ? (down ? "up" : null) : upwards ? "up" : null });
  const arrow = (key) => (by === key ? (down ? " ↓" : " ↑") : "");
  const head = (key, title, kind = "", upwards = false) => html`<th class=${kind} aria-sort=${by === key ? (down ? "descending" : "ascending") : null}>
    <button class="quiet" onClick=${() => sort(key, upwards)}>${title}${arrow(key)}</button></th>`;
  const choices = [...table.keys, ...table.tags].filter((key) => !extra.includes(key));
  const add = (event) => { set({ col: [...extra, event.target.value] }); event.target.value = ""; };
  return html`<div class="tools"><${ListTools} ...${props} shown=${shown} />
      <label>column <select aria-label="add a column" value="" onChange=${add}>
        <option value="">add…</option>${choices.map((key) => html`<option key=${key} value=${key}>${key}</option>`)}</select></label>
      <${GroupBy} state=${state} set=${set} table=${table} />
      <span class="soft">in ${table.root}</span>
    </div>
    <div class="scroll"><table class="runs">
      <thead><tr><th class="choose"></th>${head("name", "run", "left stay", true)}${head("status", "status", "left", true)}${head("step", "step", "wide-only")}
        ${table.shown.map((column) => head(column.name, column.title, "", column.best === "min"))}${head("alerts", "alerts")}
        ${extra.map((key) => html`<th class="extra"><button class="quiet" onClick=${() => sort(`+${key}`)}>${key}${arrow(`+${key}`)}</button>
          <button class="quiet" aria-label=${`remove column ${key}`} onClick=${() => set({ col: extra.filter((each) => each !== key) })}>×</button></th>`)}<th class="left">notes</th><th></th></tr></thead>
      ${groups.map(([name, members]) => html`<tbody>
        ${state.group ? html`<tr class="group"><th colspan=${7 + table.shown.length + extra.length}>${state.group} = ${String(name)} <span class="soft">${members.length}</span></th></tr>` : null}
        ${members.map((run) => html`<tr key=${run.name} class=${run.notes.hidden ? "hidden-run" : selected.includes(run.name) ? "chosen" : ""}
            onMouseEnter=${() => highlight(run.name)} onMouseLeave=${() => highlight(null)}>
          <td class="choose"><input type="checkbox" aria-label=${`show ${run.name}`} checked=${selected.includes(run.name)} onChange=${() => toggle(run.name)} /></td>
          <td class="left name stay"><${Swatch} run=${run.name} selected=${selected} places=${places} />
            <a href="#" title=${run.name} onClick=${(event) => { event.preventDefault(); set({ run: [run.name], view: "charts" }); }}>${run.name}</a></td>
          <td class="left"><span class=${statusClass(run)} title=${run.status}>${STATUS[run.status] ?? "?"} <span class="word">${run.status}</span></span>
            ${run.attempt > 1 ? html` <span class="soft" title="attempts">↻ ${run.attempt}</span>` : null}</td>
          <td class="wide-only"><${Progress} step=${run.step} steps=${run.steps} /></td>
          ${table.shown.map(({ name: key, format }) => html`<td class=${typeof run[key] === "string" ? "bad" : ""} title=${format === "ago" ? clock(run[key]) : null}>${FORMATS[format](run[key])}</td>`)}
          <td>${run.nonfinite ? html`<span class="bad" title="steps that were not finite">✕ ${run.nonfinite} </span>` : null}
            ${run.alerts ? html`<span class="warn" title="alerts">! ${run.alerts}</span>` : null}
            ${run.bad_lines ? html`<span class="bad" title="lines of its files that are no JSON">${run.bad_lines} bad ${run.bad_lines === 1 ? "line" : "lines"}</span>` : null}</td>
          ${extra.map((key) => html`<td>${show(run.columns[key])}</td>`)}
          <td class="left"><${NotesCell} run=${run} edit=${setEdited} find=${(find) => set({ find })} /></td>
          <td><${HideButton} run=${run} saved=${saved} /></td>
        </tr>`)}</tbody>`)}
    </table></div>
    ${editing ? html`<${NotesEditor} run=${editing} saved=${saved} close=${() => setEdited(null)} />` : null}`;
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

/** Order of two values; what is nothing is last, and a text, as of a loss that is not finite, before it. */
function compare(a, b, down) {
  const kind = (value) => (value === null || value === undefined ? 0 : typeof value === "number" ? 2 : 1);
  if (kind(a) !== kind(b)) return kind(b) - kind(a);
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  return down ? -order : order;
}

function grouped(runs, key) {
  const groups = new Map();
  for (const run of runs) {
    const name = key(run) ?? "–";
    groups.set(name, [...(groups.get(name) ?? []), run]);
  }
  return [...groups].sort((a, b) => compare(a[0], b[0], false));
}
