// What people write about a run: a note, tags, and that it is hidden. They lie in its folder.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.mjs";
import { send } from "./api.js";

/** A run's tags and the first line of its note, and what opens the editor. */
export function NotesCell({ run, edit, find }) {
  const { note, tags, problem, is_editable: isEditable } = run.notes;
  const why = isEditable ? "edit the note and the tags" : "the server may not write into this run folder";
  return html`<span class="notes">${problem ? html`<span class="bad" title=${problem}>notes cannot be read</span>` : null}
    ${tags.map((tag) => html`<button key=${tag} class="chip" title=${`find runs with ${tag}`} onClick=${() => find(tag)}>${tag}</button>`)}
    ${note ? html`<span class="note-line" title=${note}>${note.split("\n")[0]}</span>` : null}
    <button class="quiet pen" disabled=${!isEditable} title=${why} aria-label=${`edit notes of ${run.name}`} onClick=${() => edit(run.name)}>✎</button></span>`;
}

/** Hides a run from every list, or brings it back. */
export function HideButton({ run, saved }) {
  const [problem, setProblem] = useState(null);
  const { hidden, is_editable: isEditable } = run.notes;
  const change = async () => setProblem(await saving({ run: run.name, hidden: !hidden }, saved));
  const title = problem ?? (isEditable ? "its folder remembers it" : "the server may not write into this run folder");
  return html`<button class=${problem ? "quiet bad" : "quiet hide"} disabled=${!isEditable} title=${title}
    aria-label=${`${hidden ? "unhide" : "hide"} ${run.name}`} onClick=${change}>${hidden ? "unhide" : "hide"}</button>`;
}

/** Sends a change; why it failed, or null. */
async function saving(change, saved) {
  try {
    await send("/api/notes", change);
  } catch (error) {
    return error.message;
  }
  saved();
  return null;
}

export function NotesEditor({ run, saved, close }) {
  const first = useRef(null), note = useRef(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => { first.current.focus(); }, [run.name]);
  const save = async (event) => {
    event.preventDefault();
    const change = { run: run.name, note: note.current.value, tags: first.current.value.split(",") };
    const failed = await saving(change, saved);
    setProblem(failed);
    if (failed === null) close();
  };
  return html`<form class="panel editor" role="dialog" aria-label="notes" onSubmit=${save} key=${run.name}
      onKeyDown=${(event) => event.key === "Escape" && close()}>
    <h3>Notes of ${run.name} <button type="button" class="quiet" aria-label="close the notes" onClick=${close}>×</button></h3>
    <label>tags, with commas between <input type="text" ref=${first} defaultValue=${run.notes.tags.join(", ")} /></label>
    <label>note <textarea aria-label="note" rows="6" maxlength="10000" ref=${note} defaultValue=${run.notes.note}></textarea></label>
    ${problem ? html`<p class="problem" role="alert">${problem}</p>` : null}
    <button type="submit">save</button></form>`;
}
