// The health of the experts: who does the work, layer by layer, and how that changes.
import { html, useMemo } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { around } from "./axes.js";
import { Chart } from "./chart.js";
import { AxisTools, Lazy, axis, drawing, metricOf, unitOf } from "./charts.js";
import { Heatmap } from "./heatmap.js";
import { count, hex, number, viridis, visible } from "./format.js";

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
  const { state, set, one, oneVersion, growth, selected, table } = props;
  const two = state.two !== one && selected.includes(state.two) ? state.two : null;
  const first = useAnswer("Experts", one ? address("experts", { run: one }) : null, oneVersion);
  const twoVersion = growth.runs[two] ?? 0;
  const second = useAnswer("Experts", two ? address("experts", { run: two }) : null, twoVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  const problem = first.problem ?? (two ? second.problem : null);
  const beside = html`<label>beside <select aria-label="beside" value=${two ?? ""} onChange=${(event) => set({ two: event.target.value || null })}>
    <option value="">no other</option>${selected.filter((name) => name !== one).map((name) => html`<option key=${name} value=${name} selected=${name === two}>${name}</option>`)}</select></label>`;
  if (problem) return html`<${OneRun} ...${props}>${beside}</${OneRun}><p class="problem">${problem}</p>`;
  const shown = [{ data: first.data, version: oneVersion, run: one }, ...(two ? [{ data: second.data, version: twoVersion, run: two }] : [])];
  if (shown.some(({ data, run }) => data?.run !== run)) return html`<${OneRun} ...${props}>${beside}</${OneRun}>`;
  const tags = [...new Set(shown.flatMap(({ data }) => data.tags))];
  const withLoads = shown.filter(({ data }) => data.steps.length);
  return html`<${OneRun} ...${props}>${beside}<span class="soft" id="experts-about">${shown.map(({ data }) => aboutOf(data)).join(" · ")}</span></${OneRun}>
    ${withLoads.length ? html`<${Loads} ...${props} shown=${withLoads} />` : null}
    ${shown.filter((each) => !withLoads.includes(each)).map(({ run }) => html`<p class="note">${two ? html`<b>${run}</b>` : "This run"} has logged no loads of single experts (<code>arrays.rank0.jsonl</code>). What it logged of each layer follows.</p>`)}
    ${tags.length ? html`<${Pair} each=${shown} named draw=${({ data }) => html`<${Health} about=${data} table=${table} />`} />
      <${AxisTools} state=${state} set=${set} />
      <div class=${two ? "" : "grid"}>${tags.map((tag) => html`<${Lazy} key=${tag}><${LayerCharts} key=${shown.map(({ run }) => run).join("/")} ...${props} shown=${shown} tag=${tag} /></${Lazy}>`)}</div>` : null}`;
}

const aboutOf = (data) => `${data.layers.length} MoE ${data.layers.length === 1 ? "layer" : "layers"}${data.num_experts ? `, ${data.num_experts} experts, top ${data.top_k}` : ""}`;

/** What `draw` makes of one or two runs, side by side; `named`: under the run's name. */
function Pair({ each, draw, named }) {
  if (each.length === 1) return draw(each[0]);
  return html`<div class="pair">${each.map((part) => html`<div key=${part.run}>${named ? html`<h3 class="run">${part.run}</h3>` : null}${draw(part)}</div>`)}</div>`;
}

/** The loads at one step, and of one layer over time. */
function Loads({ state, set, shown, theme }) {
  const about = shown[0].data, steps = about.steps;
  const asked = state.step === undefined || state.step === null ? null : Number(state.step);
  const nearest = asked === null ? steps.length - 1 : steps.reduce((best, step, place) => (Math.abs(step - asked) < Math.abs(steps[best] - asked) ? place : best), 0);
  const layer = about.layers.includes(Number(state.layer)) ? Number(state.layer) : about.layers[0];
  const step = asked === null && shown.length > 1 ? null : steps[nearest];
  return html`<div class="tools">
      <label class="slider">step <input type="range" min="0" max=${steps.length - 1} value=${nearest} aria-label="step of the loads"
        onInput=${(event) => set({ step: Number(event.target.value) === steps.length - 1 ? null : steps[event.target.value] })} />
        <b id="load-step">${count(steps[nearest])}</b> ${asked === null ? html`<span class="soft">newest</span>` : html`<button class="quiet" onClick=${() => set({ step: null })}>newest</button>`}</label>
      <label>layer over time <select aria-label="layer" value=${layer} onChange=${(event) => set({ layer: event.target.value })}>${about.layers.map((each) => html`<option key=${each} value=${each} selected=${each === layer}>${each}</option>`)}</select></label>
    </div>
    <${Pair} each=${shown} named draw=${({ run, version }) => html`<${RunLoads} key=${run} run=${run} version=${version} step=${step} layer=${layer} theme=${theme} />`} />`;
}

function RunLoads({ run, version, step, layer, theme }) {
  const now = useAnswer("Load", address("load", { run, step }), version);
  const past = useAnswer("Load", address("load_history", { run, layer }), version);
  return html`${now.problem ? html`<p class="problem">${now.problem}</p>` : null}
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

/** A quantity of each layer of one run, or of two on the same y axis. */
function LayerCharts({ state, set, table, shown, tag, theme }) {
  const path = (part) => (part ? address("layers", { run: part.run, tag, ...axis(state) }) : null);
  const first = useAnswer("Layers", path(shown[0]), shown[0].version);
  const second = useAnswer("Layers", path(shown[1]), shown[1]?.version ?? 0);
  const answers = shown.map((part, place) => ({ ...part, ...[first, second][place] }));
  const ends = useMemo(() => (shown.length > 1 && first.data && second.data ? commonEnds([first.data, second.data]) : undefined), [first.data, second.data, shown.length]);
  return html`<${Pair} each=${answers} draw=${(part) => html`<${LayerChart} state=${state} set=${set} table=${table} answer=${part} tag=${tag}
    named=${shown.length > 1} fixed=${ends} theme=${theme} />`} />`;
}

function LayerChart({ state, set, table, answer, tag, named, fixed, theme }) {
  const { data, problem, path, run } = answer;
  const metric = metricOf(table, `experts/${tag}`);
  const title = `${tag.replaceAll("_", " ")}${named ? `, ${run}` : ""}`;
  const lines = useMemo(() => (data ? layerLines(data, theme) : []), [data, theme]);
  if (problem) return html`<figure class="chart"><figcaption>${title}</figcaption><p class="problem">${problem}</p></figure>`;
  if (!data) return html`<figure class="chart waiting"><figcaption>${title}</figcaption></figure>`;
  const name = `experts/${tag}${named ? ` ${run}` : ""}`;
  return html`<${Chart} title=${title} unit=${unitOf(metric)} about=${`${titleOf(table, tag)}; dark to bright with depth`} x=${data.x} lines=${lines} fixed=${fixed}
    theme=${theme} ...${drawing(state, set, path)} full=${state.full === name} onFull=${(full) => set({ full: full ? name : null })} />`;
}

/** Ends of a y axis that has room for all values of some answers; undefined where there are none. */
function commonEnds(answers) {
  const all = answers.flatMap((data) => data.values.flat()).filter((value) => value !== null);
  const [low, high] = all.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
  return all.length ? around(low, high, 0) : undefined;
}

/** A line a layer, dark to bright with depth. */
function layerLines(data, theme) {
  const [low, high] = visible(theme);
  const share = (place) => (data.layers.length > 1 ? place / (data.layers.length - 1) : 0.3);
  return data.values.map((values, place) => {
    const there = values.filter((value) => value !== null);
    return {
      name: `layer ${data.layers[place]}`, values, colour: hex(viridis(low + (high - low) * share(place))), dash: [],
      min: there.length ? Math.min(...there) : null, max: there.length ? Math.max(...there) : null,
    };
  });
}
