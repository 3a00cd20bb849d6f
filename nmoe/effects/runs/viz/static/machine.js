// The machine: where a step's time goes, what the GPUs do.
import { html } from "./vendor/preact-htm.mjs";
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
  const tags = table.metrics.filter((metric) => metric.kind === "time" || metric.name.startsWith("exchange")).map((metric) => metric.name);
  return html`<${OneRun} ...${props}><span class="soft">mean of the last ${data.steps} logged steps</span></${OneRun}>
    ${data.ranks.length ? null : html`<p class="empty">This run has logged no times yet.</p>`}
    ${data.slowest === null ? null : html`<p class="note">The slowest rank is <b id="slowest">rank ${data.slowest}</b>: without its waiting it takes longest.</p>`}
    <div class="key">${data.parts.map((part, place) => html`<span><span class="swatch" style=${{ background: colour(place) }}></span>${part}</span>`)}</div>
    <div class="stacks">${data.ranks.map((rank) => html`<div class=${rank.rank === data.slowest ? "stack slow" : "stack"} key=${rank.rank}>
      <span class="stack-name">rank ${rank.rank}${rank.rank === data.slowest ? " (slowest)" : ""}</span>
      <span class="stack-bar">${rank.parts_s.map((seconds, place) => html`<span title=${`${data.parts[place]} ${ms(seconds)}`} style=${{ width: `${(100 * (seconds ?? 0)) / longest}%`, background: colour(place) }}></span>`)}</span>
      <span class="stack-total">${ms(rank.total_s)}</span></div>`)}</div>
    <div class="scroll"><table><thead><tr><th>rank</th>${data.parts.map((part) => html`<th>${part}</th>`)}<th>all</th></tr></thead>
      <tbody>${data.ranks.map((rank) => html`<tr key=${rank.rank}><th>${rank.rank}</th>${rank.parts_s.map((seconds) => html`<td>${ms(seconds)}</td>`)}<td>${ms(rank.total_s)}</td></tr>`)}</tbody></table></div>
    <${AxisTools} state=${state} set=${set} />
    <div class="grid">${tags.map((tag) => html`<${Lazy} key=${tag}><${RunChart} ...${props} selected=${[one]} version=${oneVersion} tag=${tag} /></${Lazy}>`)}</div>`;
}

const TITLES = {
  utilization: ["Utilization (%)", (value) => number(value, 1)], memory_used_bytes: ["Memory used", bytes], power_w: ["Power (W)", (value) => number(value, 1)],
  temperature_c: ["Temperature (°C)", (value) => number(value, 1)], sm_clock_mhz: ["SM clock (MHz)", count], memory_clock_mhz: ["Memory clock (MHz)", count],
  ecc_corrected: ["ECC errors, corrected", count], ecc_uncorrected: ["ECC errors, not corrected", count],
};

export function GpusView(props) {
  const { one, oneVersion, theme } = props;
  const { data, problem } = useAnswer("Gpus", one ? address("gpus", { run: one }) : null, oneVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem || !data) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  const host = Object.entries(data.host);
  return html`<${OneRun} ...${props}><span class="soft" id="gpus-about">${data.driver ? `driver ${data.driver}, CUDA ${data.cuda}` : ""}
      ${data.seen ? ` seen ${clock(data.seen)}` : ""}</span></${OneRun}>
    ${data.gpus.length ? html`<div class="scroll"><table id="gpus"><thead><tr><th>GPU</th><th class="left">name</th><th>utilization</th><th>memory</th><th>power</th><th>temperature</th><th>SM clock</th><th>memory clock</th><th class="left">throttled by</th><th>ECC</th></tr></thead>
      <tbody>${data.gpus.map((gpu) => html`<tr key=${`${gpu.rank} ${gpu.index}`}><th title=${gpu.uuid}>${gpu.rank ? `${gpu.rank}/` : ""}${gpu.index}</th><td class="left">${gpu.name}</td>
        <td>${number(gpu.utilization, 0)} %</td><td>${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_total_bytes)}</td><td>${number(gpu.power_w, 0)} of ${number(gpu.power_limit_w, 0)} W</td>
        <td>${number(gpu.temperature_c, 0)} °C</td><td>${count(gpu.sm_clock_mhz)} MHz</td><td>${count(gpu.memory_clock_mhz)} MHz</td>
        <td class=${gpu.throttle.length ? "left warn" : "left"}>${gpu.throttle.join(", ") || "nothing"}</td>
        <td class=${gpu.ecc_uncorrected > 0 ? "bad" : ""}>${count(gpu.ecc_corrected)} / ${count(gpu.ecc_uncorrected)}</td></tr>`)}</tbody></table></div>`
      : html`<p class="empty">No GPU telemetry${data.x.length ? "" : ", and none of the host (telemetry.rank0.jsonl)"}.</p>`}
    ${host.length ? html`<p class="note">host: ${host.map(([key, value]) => `${key.replace(/_bytes$/, "").replaceAll("_", " ")} ${key.endsWith("_bytes") ? bytes(value) : number(value, 1)}`).join(" · ")}</p>` : null}
    <div class="grid">${data.curves.map((curve) => {
      const [title, format] = TITLES[curve.quantity] ?? [curve.quantity.replace(/_bytes$/, "").replaceAll("_", " "), curve.quantity.endsWith("_bytes") ? bytes : (value) => number(value, 1)];
      const lines = curve.values.map((values, place) => ({ name: curve.names[place], values, colour: colour(place), dash: dash(place) }));
      return html`<${Chart} key=${curve.quantity} title=${title} x=${data.x} lines=${lines} xName="hours" format=${format} sync="telemetry" theme=${theme} />`;
    })}</div>`;
}
