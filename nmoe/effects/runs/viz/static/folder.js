// What lies in a run folder: checkpoints to resume from, and what the run printed.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { OneRun } from "./experts.js";
import { bytes, clock, count, number } from "./format.js";

export function CheckpointsView(props) {
  const { one, oneVersion } = props;
  const { data, problem } = useAnswer("Checkpoints", one ? address("checkpoints", { run: one }) : null, oneVersion);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem || !data) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  const losses = data.checkpoints.map((saved) => saved.validation_loss).filter((loss) => loss !== null);
  const best = losses.length ? Math.min(...losses) : null;
  const isBest = (saved) => saved.validation_loss !== null && saved.validation_loss === best;
  const deleted = data.deleted ? `, ${data.deleted} deleted since` : "";
  return html`<${OneRun} ...${props}><span class="soft">${data.checkpoints.length} here${deleted}</span></${OneRun}>
    ${data.checkpoints.length ? html`<div class="scroll"><table id="checkpoints"><thead><tr><th>step</th><th>val loss</th><th class="wide-only">size</th>
      <th class="wide-only">saved in</th><th class="wide-only">time</th><th class="left">resume from it</th></tr></thead>
      <tbody>${data.checkpoints.map((saved) => html`<tr key=${saved.name}>
        <td title=${saved.name}>${count(saved.step)}${saved.attempt > 1 ? html` <span class="soft">↻ ${saved.attempt}</span>` : null}</td>
        <td class=${isBest(saved) ? "good" : ""}>${number(saved.validation_loss)}</td><td class="wide-only">${bytes(saved.size_bytes)}</td>
        <td class="wide-only">${saved.seconds === null ? "–" : `${number(saved.seconds, 2)} s`}</td><td class="wide-only">${clock(saved.time)}</td>
        <td class="left"><${Command} text=${saved.command} /></td></tr>`)}</tbody></table></div>
      <p class="note">The loss is of the last validation up to the step. The command resumes the run in its own folder, and removes what was logged
        after that step; with <code>--run.name=ANOTHER</code> behind it, it branches off instead.</p>`
      : html`<p class="empty">No checkpoint in the folder of this run.</p>`}`;
}

/** A command to copy. */
function Command({ text }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => { await navigator.clipboard.writeText(text); setCopied(true); setTimeout(() => setCopied(false), 1500); };
  return html`<span class="command">${navigator.clipboard ? html`<button class="quiet" onClick=${copy}>${copied ? "copied" : "copy"}</button>` : null}
    <code>${text.split(" ").map((word, place) => html`${place ? " " : ""}<span class="word">${word}</span>`)}</code></span>`;
}

export function ConsoleView(props) {
  const { state, set, one, oneVersion, growth } = props;
  const { data, problem } = useAnswer("Console", one ? address("console", { run: one }) : null, `${oneVersion} ${growth.version}`);
  const place = useRef(null);
  const leftOut = data?.left_out_bytes ? `, ${bytes(data.left_out_bytes)} before them left out` : "";
  const lines = data ? data.lines.filter((line) => line.toLowerCase().includes((state.line ?? "").toLowerCase())) : [];
  useEffect(() => { if (place.current) place.current.scrollTop = place.current.scrollHeight; }, [lines.length, one]);
  if (!one) return html`<p class="empty">Choose a run in the list.</p>`;
  if (problem || !data) return html`<${OneRun} ...${props} /><p class="problem">${problem}</p>`;
  return html`<${OneRun} ...${props}>
      <input type="search" placeholder="find lines" aria-label="find lines" value=${state.line ?? ""}
        onInput=${(event) => set({ line: event.target.value })} />
      <span class="soft">${lines.length} ${lines.length === 1 ? "line" : "lines"}${leftOut}</span></${OneRun}>
    ${data.is_there ? html`<pre class="console" id="console" ref=${place}>${lines.join("\n")}</pre>`
      : html`<p class="empty">This run folder has no <code>console.log</code>.</p>`}`;
}
