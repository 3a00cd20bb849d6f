// The data: what prepared folders hold, and single documents as the model sees them.
import { html } from "./vendor/preact-htm.mjs";
import { address, useAnswer } from "./api.js";
import { OneRun } from "./experts.js";
import { bytes, count, number, percent } from "./format.js";

export function DataView(props) {
  const { state, set, one, oneVersion } = props;
  const { data, problem } = useAnswer("Folders", address("folders", {}), 0);
  const mixture = useAnswer("Mixture", one ? address("mixture", { run: one }) : null, oneVersion);
  if (problem) return html`<p class="problem">${problem}</p>`;
  if (!data) return null;
  const folder = data.folders[Number(state.folder ?? 0)];
  return html`
    ${one ? html`<${OneRun} ...${props} />` : null}
    ${mixture.problem ? html`<p class="problem">${mixture.problem}</p>` : null}
    ${mixture.data && (mixture.data.sources.length || Object.keys(mixture.data.config).length) ? html`<${Mixture} data=${mixture.data} />` : null}
    ${data.folders.length ? null : html`<div class="empty"><h2>No prepared data</h2><p>Name folders to look into:</p><pre>nmoe viz --data FOLDER</pre></div>`}
    ${folder ? html`<div class="tools"><label>folder <select aria-label="data folder" value=${folder.number} onChange=${(event) => set({ folder: event.target.value, split: null, doc: null })}>
        ${data.folders.map((each) => html`<option value=${each.number} selected=${each.number === folder.number}>${each.path}</option>`)}</select></label></div>
      ${folder.problems.map((each) => html`<p class="problem">${each}</p>`)}
      ${folder.tokenizer ? html`<p class="note">tokenizer <code>${folder.tokenizer.slice(0, 16)}</code>, ${count(folder.tokenizer_size)} tokens</p>` : null}
      ${folder.splits.length ? html`<${Splits} folder=${folder} /><${Documents} state=${state} set=${set} folder=${folder} />` : null}` : null}`;
}

function Mixture({ data }) {
  const stages = new Set(data.sources.map((source) => source.stage));
  const isRewound = data.sources.some((source) => source.left_out);
  const share = (source) => source.read / Math.max(1, source.planned - source.left_out);
  return html`<h3>What ${data.run} reads ${data.step === null ? null : html`<span class="soft">at step ${data.step}</span>`}</h3>
    ${data.sources.length ? html`<div class="scroll"><table id="mixture"><thead><tr>${stages.size > 1 ? html`<th class="left">stage</th>` : null}<th class="left">source</th>
        <th>planned share</th><th>read share</th><th>planned tokens</th>${isRewound ? html`<th title="not read since a rewind">left out</th>` : null}<th>read tokens</th><th>read</th><th>passes</th></tr></thead>
      <tbody>${data.sources.map((source) => html`<tr>${stages.size > 1 ? html`<td class="left">${source.stage}</td>` : null}<td class="left">${source.name}</td>
        <td>${percent(source.planned_share)}</td><td>${percent(source.read_share)}</td><td>${count(source.planned)}</td>${isRewound ? html`<td>${count(source.left_out)}</td>` : null}<td>${count(source.read)}</td>
        <td><span class="bar" title=${percent(share(source))}><span style=${{ width: `${100 * share(source)}%` }}></span></span></td><td>${number(source.passes, 2)}</td></tr>`)}</tbody></table></div>`
      : html`<div class="scroll"><table id="data-config">${Object.entries(data.config).map(([key, value]) => html`<tr><th class="left">${key.replace(/^data\./, "").replaceAll(/[._]/g, " ")}</th>
        <td class="left">${Array.isArray(value) ? value.join(", ") : String(value)}</td></tr>`)}</table></div>`}`;
}

function Splits({ folder }) {
  return html`<div class="scroll"><table id="splits"><thead><tr><th class="left">split / shard</th><th>tokens</th><th>documents</th><th>tokens a document</th><th>text</th><th>bytes a token</th><th>on disk</th></tr></thead>
    ${folder.splits.map((split) => html`<tbody><tr class="group"><th class="left">${split.name}</th><${Cells} of=${split} /><td>${onDisk(split)}</td></tr>
      ${split.shards.slice(0, 100).map((shard) => html`<tr><td class="left" title=${shard.sha256}>${shard.file}</td><${Cells} of=${shard} /><td class=${shard.size_bytes === null ? "bad" : ""}>${shard.size_bytes === null ? "missing" : bytes(shard.size_bytes)}</td></tr>`)}</tbody>`)}</table></div>`;
}

const Cells = ({ of }) => html`<td>${count(of.tokens)}</td><td>${count(of.documents)}</td><td>${number(of.documents ? of.tokens / of.documents : null, 1)}</td>
  <td>${bytes(of.bytes)}</td><td>${number(of.tokens ? of.bytes / of.tokens : null, 2)}</td>`;

/** Shards of a split, and the bytes of those that are there. */
function onDisk(split) {
  const size = split.shards.reduce((sum, shard) => sum + (shard.size_bytes ?? 0), 0);
  return `${split.shards.length} ${split.shards.length === 1 ? "shard" : "shards"}, ${bytes(size)}`;
}

function Documents({ state, set, folder }) {
  const split = folder.splits.find((each) => each.name === state.split) ?? folder.splits[0];
  const doc = Math.min(Number(state.doc ?? 0) || 0, Math.max(split.documents - 1, 0));
  const { data, problem } = useAnswer("Document", split.documents ? address("document", { folder: folder.number, split: split.name, number: String(doc) }) : null, 0);
  const go = (number) => set({ doc: Math.min(Math.max(number, 0), split.documents - 1) });
  return html`<div class="tools"><label>split <select aria-label="split" value=${split.name} onChange=${(event) => set({ split: event.target.value, doc: null })}>${folder.splits.map((each) => html`<option key=${each.name} value=${each.name} selected=${each.name === split.name}>${each.name}</option>`)}</select></label>
      <label>document <input type="number" min="0" max=${split.documents - 1} value=${doc} aria-label="document" onChange=${(event) => go(Number(event.target.value))} /></label>
      <button onClick=${() => go(doc - 1)}>previous</button><button onClick=${() => go(doc + 1)}>next</button>
      <label><input type="checkbox" checked=${state.tokens === "1"} onChange=${() => set({ tokens: state.tokens === "1" ? null : "1" })} />tokens</label></div>
    ${problem ? html`<p class="problem">${problem}</p>` : null}
    ${data ? html`<article class="sample"><h3>document ${count(data.number)} of ${data.documents} <span class="soft">${data.num_tokens} ${data.num_tokens === 1 ? "token" : "tokens"} and the end of text${data.left_out ? `, the last ${data.left_out} not shown` : ""}</span></h3>
      ${state.tokens === "1" ? html`<pre class="tokens">${data.tokens.map((token, place) => html`<span class=${place % 2 ? "odd" : "even"} title=${`token ${token.id}`}>${token.text}</span>`)}</pre>`
        : html`<pre id="document">${data.text}</pre>`}</article>` : null}`;
}
