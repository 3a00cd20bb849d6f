// The machine: where a step's time goes, what the GPUs do.
import { html, useMemo } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { Chart } from "./chart.js";
import { AxisTools, Lazy, RunChart } from "./charts.js";
import { OneRun } from "./experts.js";
import { bytes, clock, colour, count, dash, number } from "./format.js";

const ms = (seconds) => (seconds === null ? "–" : `${number(1000 * seconds, seconds < 0.01 ? 2 : 1)} ms`);

export function TimingView(props) {
  const { state, set, table, one, oneVersion } = props;
  const { data, problem } = useAnswer("Timing", one ? address("timing", { run: one }) : null, oneVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem || !data) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  const longest = Math.max(...data.ranks.map((rank) => rank.total_s), 1e-12);
  const own = new Set(props.runs.find((run) => run.name === one).tags.map((place) => table.tags[place]));
  const tags = table.metrics.filter((metric) => own.has(metric.name) && (metric.kind === "time" || metric.name.startsWith("exchange"))).map((metric) => metric.name);
  return html`<${OneRun} ...${props}><span class="soft">mean of the last ${data.steps} logged steps</span></${OneRun}>
    ${data.ranks.length ? null : html`<p class="empty">This run has logged no times yet.</p>`}
    ${data.slowest === null ? null : html`<p class="note">The slowest rank is <b id="slowest">rank ${data.slowest}</b>: its own work takes longest, and the others wait for it.</p>`}
    <div class="key">${data.parts.map((part, place) => html`<span><span class="swatch" style=${{ background: colour(place) }}></span>${part}</span>`)}</div>
    <div class="stacks">${data.ranks.map((rank) => html`<div class=${rank.rank === data.slowest ? "stack slow" : "stack"} key=${rank.rank}>
      <span class="stack-name">rank ${rank.rank}${rank.rank === data.slowest ? " (slowest)" : ""}</span>
      <span class="stack-bar">${rank.parts_s.map((seconds, place) => html`<span title=${`${data.parts[place]} ${ms(seconds)}`} style=${{ width: `${(100 * (seconds ?? 0)) / longest}%`, background: colour(place) }}></span>`)}</span>
      <span class="stack-total">${ms(rank.total_s)}</span></div>`)}</div>
    ${data.ranks.length ? html`<details class="section"><summary>as a table</summary><div class="scroll"><table><thead><tr><th>rank</th>${data.parts.map((part) => html`<th>${part}</th>`)}<th>all</th></tr></thead>
      <tbody>${data.ranks.map((rank) => html`<tr key=${rank.rank}><th>${rank.rank}</th>${rank.parts_s.map((seconds) => html`<td>${ms(seconds)}</td>`)}<td>${ms(rank.total_s)}</td></tr>`)}</tbody></table></div></details>` : null}
    <${AxisTools} state=${state} set=${set} />
    <div class="grid">${tags.map((tag) => html`<${Lazy} key=${tag}><${RunChart} ...${props} selected=${[one]} version=${oneVersion} tag=${tag} /></${Lazy}>`)}</div>`;
}

/** Title, unit, how a value is read, and the ends of the axis; null: the most there is. */
const QUANTITIES = {
  utilization: ["Utilization", "%", number, [0, 100]], memory_used_bytes: ["Memory used", "", bytes, [0, null]],
  power_w: ["Power", "W", number], temperature_c: ["Temperature", "°C", number], sm_clock_mhz: ["SM clock", "MHz", count],
  memory_clock_mhz: ["Memory clock", "MHz", count], ecc_corrected: ["ECC errors, corrected", "", count],
  ecc_uncorrected: ["ECC errors, not corrected", "", count],
  "host cpu_percent": ["Host CPU", "%", number, [0, 100]], "host memory_used_bytes": ["Host memory used", "", bytes, [0, null]],
  "host disk_free_bytes": ["Disk free", "", bytes],
};
const quantityOf = (name) => QUANTITIES[name] ?? [name.replace(/_bytes$/, "").replaceAll("_", " "), "", name.endsWith("_bytes") ? bytes : number];

export function GpusView(props) {
  const { one, oneVersion, theme } = props;
  const { data, problem } = useAnswer("Gpus", one ? address("gpus", { run: one }) : null, oneVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem || !data) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  const host = Object.entries(data.host);
  return html`<${OneRun} ...${props}><span class="soft" id="gpus-about">${data.driver ? `driver ${data.driver}, CUDA ${data.cuda}` : ""}
      ${data.seen ? `, seen ${clock(data.seen)}` : ""}</span></${OneRun}>
    ${data.gpus.length ? html`<div class="scroll"><table id="gpus"><thead><tr><th>GPU</th><th class="left">name</th><th>utilization</th><th>memory</th><th>power</th><th>temperature</th><th>SM clock</th><th>memory clock</th><th class="left">throttled by</th><th>ECC</th></tr></thead>
      <tbody>${data.gpus.map((gpu) => html`<tr key=${`${gpu.rank} ${gpu.index}`}><th title=${gpu.uuid}>${gpu.rank ? `${gpu.rank}/` : ""}${gpu.index}</th><td class="left">${gpu.name}</td>
        <td>${number(gpu.utilization, 0)} %</td><td>${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_total_bytes)}</td><td>${number(gpu.power_w, 0)} of ${number(gpu.power_limit_w, 0)} W</td>
        <td>${number(gpu.temperature_c, 0)} °C</td><td>${count(gpu.sm_clock_mhz)} MHz</td><td>${count(gpu.memory_clock_mhz)} MHz</td>
        <td class=${gpu.throttle.length ? "left warn" : "left"}>${gpu.throttle.map((reason) => reason.replaceAll("_", " ")).join(", ") || "nothing"}</td>
        <td class=${gpu.ecc_uncorrected > 0 ? "bad" : ""}>${count(gpu.ecc_corrected)} / ${count(gpu.ecc_uncorrected)}</td></tr>`)}</tbody></table></div>`
      : html`<p class="empty">No GPU telemetry${data.x.length ? "" : ", and none of the host (telemetry.rank0.jsonl)"}.</p>`}
    ${host.length ? html`<p class="note" id="host">host: ${hostWords(data.host)}</p>` : null}
    <div class="grid">${data.curves.map((curve) => html`<${MachineChart} key=${curve.quantity} ...${props} data=${data} curve=${curve} />`)}</div>`;
}

/** What the host's last reading says. */
function hostWords(host) {
  const known = [
    host.cpu_percent === undefined ? null : `CPU ${number(host.cpu_percent, 1)} %`,
    host.memory_used_bytes === undefined ? null : `memory ${bytes(host.memory_used_bytes)} of ${bytes(host.memory_total_bytes)}`,
    host.disk_free_bytes === undefined ? null : `disk ${bytes(host.disk_free_bytes)} free`,
  ];
  return known.filter(Boolean).join(" · ");
}

function MachineChart({ state, set, data, curve, theme }) {
  const [title, unit, format, ends] = quantityOf(curve.quantity);
  const lines = useMemo(() => curve.values.map((values, place) => lineOf(curve.names[place], values, place)), [curve, theme]);
  const fixed = useMemo(() => ends && [ends[0], ends[1] ?? most(data, curve)], [data, curve]);
  return html`<${Chart} title=${title} unit=${unit} x=${data.x} lines=${lines} axis="time" format=${format} least=${0.1} fixed=${fixed} theme=${theme}
    full=${state.full === title} onFull=${(full) => set({ full: full ? title : null })} />`;
}

function lineOf(name, values, place) {
  const there = values.filter((value) => value !== null);
  return {
    name, values, colour: colour(place), dash: dash(place),
    min: there.length ? Math.min(...there) : null, max: there.length ? Math.max(...there) : null,
  };
}

/** The most there can be of a quantity: of memory the total, else the most there was. */
function most(data, curve) {
  const total = curve.quantity.startsWith("host") ? data.host.memory_total_bytes : Math.max(...data.gpus.map((gpu) => gpu.memory_total_bytes ?? 0));
  return total || Math.max(1, ...curve.values.flat());
}
