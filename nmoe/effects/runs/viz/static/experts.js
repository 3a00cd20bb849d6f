// The health of the experts: who does the work, layer by layer, and how that changes.
import { html, useMemo } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { Chart } from "./chart.js";
import { AxisTools, Lazy, axis, drawing, metricOf, unitOf } from "./charts.js";
import { Heatmap } from "./heatmap.js";
import { count, hex, number, viridis } from "./format.js";

/** What the server says of a quantity of the experts. */
function titleOf(table, tag) {
  return metricOf(table, `experts/${tag}`)?.doc || tag;
}

/** One of the chosen runs. */
export function OneRun({ runs, set, selected, one, children }) {
  const begun = new Set(runs.filter((run) => run.step !== null).map((run) => run.name));
  return html`<div class="tools"><label>run <select aria-label="run" value=${one} onChange=${(event) => set({ one: event.target.value, step: null, layer: null })}>
    ${selected.map((name) => html`<option key=${name} value=${name} selected=${name === one}>${name}${begun.has(name) ? "" : " (no step yet)"}</option>`)}</select></label>${children}</div>`;
}

export function ExpertsView(props) {
  const { state, set, one, oneVersion, theme } = props;
  const { data, problem } = useAnswer("Experts", one ? address("experts", { run: one }) : null, oneVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  if (!data) return html`<${OneRun} ...${props} />`;
  return html`<${OneRun} ...${props}><span class="soft" id="experts-about">
      ${data.layers.length} MoE ${data.layers.length === 1 ? "layer" : "layers"}${data.num_experts ? `, ${data.num_experts} experts, top ${data.top_k}` : ""}</span></${OneRun}>
    ${data.steps.length ? html`<${Loads} ...${props} about=${data} />`
      : html`<p class="note">This run has logged no loads of single experts (<code>arrays.rank0.jsonl</code>). What it logged of each layer follows.</p>`}
    ${data.tags.length ? html`<${Health} about=${data} table=${props.table} />
      <${AxisTools} state=${state} set=${set} />
      <div class="grid">${data.tags.map((tag) => html`<${Lazy} key=${tag}><${LayerChart} state=${state} set=${set} table=${props.table} run=${one} tag=${tag} version=${oneVersion} theme=${theme} /></${Lazy}>`)}</div>` : null}`;
}

function Loads({ state, set, one, about, oneVersion, theme }) {
  const steps = about.steps;
  const asked = state.step === undefined || state.step === null ? null : Number(state.step);
  const nearest = asked === null ? steps.length - 1 : steps.reduce((best, step, place) => (Math.abs(step - asked) < Math.abs(steps[best] - asked) ? place : best), 0);
  const layer = about.layers.includes(Number(state.layer)) ? Number(state.layer) : about.layers[0];
  const now = useAnswer("Load", address("load", { run: one, step: steps[nearest] }), oneVersion);
  const past = useAnswer("Load", address("load_history", { run: one, layer }), oneVersion);
  return html`<div class="tools">
      <label class="slider">step <input type="range" min="0" max=${steps.length - 1} value=${nearest} aria-label="step of the loads"
        onInput=${(event) => set({ step: Number(event.target.value) === steps.length - 1 ? null : steps[event.target.value] })} />
        <b id="load-step">${count(steps[nearest])}</b> ${asked === null ? html`<span class="soft">newest</span>` : html`<button class="quiet" onClick=${() => set({ step: null })}>newest</button>`}</label>
      <label>layer over time <select aria-label="layer" value=${layer} onChange=${(event) => set({ layer: event.target.value })}>${about.layers.map((each) => html`<option key=${each} value=${each} selected=${each === layer}>${each}</option>`)}</select></label>
    </div>
    ${now.problem ? html`<p class="problem">${now.problem}</p>` : null}
    ${now.data ? html`<${LoadMap} title=${`Load of each expert at step ${now.data.step}`} load=${now.data.load} rows=${now.data.rows} rowName="layer" theme=${theme} />` : null}
    ${past.problem ? html`<p class="problem">${past.problem}</p>` : null}
    ${past.data ? html`<${LoadMap} title=${`Load of each expert of layer ${layer} over time`} load=${past.data.load} rows=${past.data.rows} rowName="step" turned theme=${theme} />` : null}`;
}

/** Loads as shares of their row's mean; `turned` puts the rows on the horizontal axis. */
function LoadMap({ title, load, rows, rowName, turned, theme }) {
  const drawn = useMemo(() => {
    const shares = load.map((line) => {
      const mean = line.reduce((sum, each) => sum + each, 0) / Math.max(line.length, 1);
      return line.map((each) => (mean ? each / mean : 0));
    });
    const experts = [...(load[0] ?? []).keys()];
    const across = turned ? experts.map((expert) => shares.map((line) => line[expert] ?? 0)) : shares;
    return { shares, experts, across };
  }, [load, turned]);
  const describe = (row, column) => {
    const [line, expert] = turned ? [column, row] : [row, column];
    return `${rowName} ${rows[line]}, expert ${expert}: ${count(load[line][expert])} rows, ${number(drawn.shares[line][expert], 2)} × mean`;
  };
  return html`<${Heatmap} title=${title} rows=${turned ? drawn.experts : rows} columns=${turned ? rows : drawn.experts} values=${drawn.across}
    rowName=${turned ? "expert" : rowName} columnName=${turned ? rowName : "expert"} describe=${describe} theme=${theme} />`;
}

function Health({ about, table }) {
  const tags = about.tags;
  const limit = (tag) => metricOf(table, `experts/${tag}`)?.bad_above ?? Infinity;
  return html`<h3>Latest, step ${count(about.step)}</h3><div class="scroll"><table id="experts-latest"><thead><tr><th>layer</th>${tags.map((tag) => html`<th title=${titleOf(table, tag)}>${tag.replaceAll("_", " ")}</th>`)}</tr></thead>
    <tbody>${about.layers.map((layer, place) => html`<tr key=${layer}><th>${layer}</th>
      ${tags.map((tag) => { const value = about.latest[tag][place]; return html`<td class=${value !== null && value > limit(tag) ? "bad" : ""}>${number(value)}</td>`; })}</tr>`)}</tbody></table></div>`;
}

function LayerChart({ state, set, table, run, tag, version, theme }) {
  const { data, problem, path } = useAnswer("Layers", address("layers", { run, tag, ...axis(state) }), version);
  const metric = metricOf(table, `experts/${tag}`);
  const title = tag.replaceAll("_", " ");
  const lines = useMemo(() => (data ? layerLines(data, theme) : []), [data, theme]);
  if (problem) return html`<figure class="chart"><figcaption>${title}</figcaption><p class="problem">${problem}</p></figure>`;
  if (!data) return html`<figure class="chart waiting"><figcaption>${title}</figcaption></figure>`;
  const name = `experts/${tag}`;
  return html`<${Chart} title=${title} unit=${unitOf(metric)} about=${`${titleOf(table, tag)}; dark to bright with depth`} x=${data.x} lines=${lines}
    theme=${theme} ...${drawing(state, set, path)} full=${state.full === name} onFull=${(full) => set({ full: full ? name : null })} />`;
}

/** A line a layer, dark to bright with depth. */
function layerLines(data, theme) {
  const [low, high] = theme === "dark" ? [0.3, 1] : [0, 0.85];
  const share = (place) => (data.layers.length > 1 ? place / (data.layers.length - 1) : 0.3);
  return data.values.map((values, place) => {
    const there = values.filter((value) => value !== null);
    return {
      name: `layer ${data.layers[place]}`, values, colour: hex(viridis(low + (high - low) * share(place))), dash: [],
      min: there.length ? Math.min(...there) : null, max: there.length ? Math.max(...there) : null,
    };
  });
}
