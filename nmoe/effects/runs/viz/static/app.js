// The page: its address, the list of runs, the views.
import { html, render, useEffect, useMemo, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer, watch } from "./api.js";
import { link, read, write } from "./state.js";
import { bytes, duration } from "./format.js";
import { AlertsPanel, RunList, alertCount } from "./list.js";
import { RunsView } from "./runs.js";
import { ChartsView } from "./charts.js";
import { ExpertsView } from "./experts.js";
import { GpusView, TimingView } from "./machine.js";
import { ConfigsView, EvaluationsView, EventsView, SamplesView } from "./results.js";
import { CheckpointsView, ConsoleView } from "./folder.js";
import { CompareView } from "./compare.js";
import { DataView } from "./data.js";

const VIEWS = [
  ["runs", "Runs", RunsView], ["charts", "Charts", ChartsView], ["experts", "Experts", ExpertsView],
  ["timing", "Timing", TimingView], ["gpus", "GPUs", GpusView], ["evaluations", "Evaluations", EvaluationsView],
  ["events", "Events", EventsView], ["configs", "Configs", ConfigsView], ["samples", "Samples", SamplesView],
  ["data", "Data", DataView], ["checkpoints", "Checkpoints", CheckpointsView], ["console", "Console", ConsoleView],
  ["compare", "Compare", CompareView],
];

/** Keys of the config and metrics that the view asks for beside those of the table. */
const columnsOf = (state) => [...new Set([...(state.col ?? []), ...[state.group, state.cy].filter(Boolean)])];
const SHOWN_AT_FIRST = 6;

/** The address as a value, and what changes it. */
function useAddress() {
  const [state, setState] = useState(read);
  useEffect(() => {
    const back = () => setState(read());
    addEventListener("popstate", back);
    return () => removeEventListener("popstate", back);
  }, []);
  const set = (patch) => setState((old) => {
    const next = { ...old, ...patch };
    write(next, "view" in patch && patch.view !== old.view);
    return next;
  });
  return [state, set];
}

/** What the server says grew: a number for each run that rises when it does. */
function useGrowth() {
  const [told, setTold] = useState({ version: 0, runs: {}, problems: [], left: 0, leftS: null, connected: true });
  useEffect(() => {
    const listen = (message) => setTold((old) => {
      const runs = { ...old.runs };
      for (const name of message.grown) runs[name] = (runs[name] ?? 0) + 1;
      const moved = message.grown.length || message.gone.length;
      return {
        ...old, runs, version: old.version + (moved ? 1 : 0), problems: message.problems,
        left: message.left_bytes, leftS: message.left_s,
      };
    });
    let stream = watch(listen, (connected) => setTold((old) => ({ ...old, connected })));
    const pause = () => {
      stream.close();
      if (!document.hidden) {
        setTold((old) => ({ ...old, version: old.version + 1 }));
        stream = watch(listen, (connected) => setTold((old) => ({ ...old, connected })));
      }
    };
    document.addEventListener("visibilitychange", pause);
    // Heartbeats stop without anything growing: look at the statuses now and then.
    const timer = setInterval(() => setTold((old) => ({ ...old, version: old.version + 1 })), 10000);
    return () => { stream.close(); clearInterval(timer); document.removeEventListener("visibilitychange", pause); };
  }, []);
  return told;
}

/** The runs that are shown: those in the address, all of them for `*`, at first the newest. */
function chosen(state, runs) {
  const names = runs.map((run) => run.name);
  if (!state.run) return names.slice(0, SHOWN_AT_FIRST);
  if (state.run.includes("*")) return names;
  return names.filter((name) => state.run.includes(name));
}

/** Tags that one of the chosen runs has logged, in the order of the table. */
function presentTags(table, runs, selected) {
  const wanted = new Set(selected), places = new Set();
  for (const run of runs) if (wanted.has(run.name)) run.tags.forEach((place) => places.add(place));
  return table ? table.tags.filter((_, place) => places.has(place)) : [];
}

function App() {
  const [state, set] = useAddress();
  const growth = useGrowth();
  const [open, setOpen] = useState(false);
  const [help, setHelp] = useState(false);
  const [alerts, setAlerts] = useState(false);
  const theme = useTheme(state.theme);
  const filter = useRef(null);
  const [changes, setChanges] = useState(0);
  const answer = useAnswer("Runs", address("runs", { column: columnsOf(state) }), growth.version + changes);
  const table = answer.data;
  const all = table ? table.runs : [];
  const runs = useMemo(() => all.filter((run) => state.hidden || !run.notes.hidden), [table, state.hidden]);
  const saved = () => setChanges((old) => old + 1);
  const selected = useMemo(() => chosen(state, runs), [state.run, runs]);
  const places = useMemo(() => new Map(all.map((run, place) => [run.name, all.length - 1 - place])), [table]);
  const view = VIEWS.find(([name]) => name === state.view) ?? VIEWS[0];
  const begun = runs.find((run) => run.step !== null && selected.includes(run.name));
  const one = selected.includes(state.one) ? state.one : begun?.name ?? selected[0];
  const toggle = (name) => {
    const next = selected.includes(name) ? selected.filter((each) => each !== name) : [...selected, name];
    set({ run: next.length ? next : ["-"] });
  };

  useEffect(() => {
    const press = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") { setHelp(false); setOpen(false); setAlerts(false); set({ full: null }); event.target.blur?.(); return; }
      if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
      const digit = "1234567890".indexOf(event.key);
      if (digit >= 0) set({ view: VIEWS[digit][0] });
      else if (event.key === "/") { event.preventDefault(); setOpen(true); filter.current?.focus(); }
      else if (event.key === "l") set({ logy: state.logy ? null : "1" });
      else if (event.key === "r") set({ low: null, high: null });
      else if (event.key === "t") set({ theme: theme === "dark" ? "light" : "dark" });
      else if (event.key === "?") setHelp((old) => !old);
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });

  const problems = [
    ...(growth.connected ? [] : ["the server does not answer; is `nmoe viz` still running? this page tries again"]),
    ...growth.problems, ...(answer.problem ? [answer.problem] : []),
  ];
  const present = useMemo(() => presentTags(table, runs, selected), [table, runs, selected]);
  const shared = { state, set, growth, table, runs, selected, places, one, theme, toggle, filter, present, saved };
  const grown = (name) => growth.runs[name] ?? 0;
  return html`
    <header>
      <button class="quiet menu" hidden=${view[0] === "runs"} aria-label="list of runs" aria-expanded=${open} onClick=${() => setOpen(!open)}>☰</button>
      <a class="brand" href="/"><img src="/static/icon.svg" alt="" width="22" height="22" />nmoe</a>
      <${Views} here=${view[0]} state=${state} set=${set} />
      <${Live} connected=${growth.connected} runs=${all} />
      ${alertCount(runs) ? html`<button class="quiet warn" aria-label="alerts" aria-expanded=${alerts} title="alerts of all runs" onClick=${() => setAlerts(!alerts)}>! ${alertCount(runs)}</button>` : null}
      <button class="quiet" aria-label="light or dark" title="light or dark (t)" onClick=${() => set({ theme: theme === "dark" ? "light" : "dark" })}>◐</button>
      <button class="quiet" aria-label="keys" title="keys (?)" onClick=${() => setHelp(!help)}>?</button>
    </header>
    ${problems.length ? html`<div class="problems" role="alert">${problems.map((each) => html`<div>${each}</div>`)}</div>` : null}
    ${growth.left ? html`<div class="progress" role="status">reading the runs: ${bytes(growth.left)} left${growth.leftS ? `, about ${duration(growth.leftS)}` : ""}</div>` : null}
    ${help ? html`<${Keys} close=${() => setHelp(false)} />` : null}
    ${alerts ? html`<${AlertsPanel} set=${set} runs=${runs} version=${growth.version} close=${() => setAlerts(false)} />` : null}
    <div class="body">
      ${view[0] === "runs" ? null : html`<aside class=${open ? "open" : ""} aria-label="runs"><${RunList} ...${shared} /></aside>`}
      <main onClick=${() => open && setOpen(false)}>
        ${table === null ? html`<p class="empty">${answer.problem ? "" : "loading"}</p>`
          : all.length === 0 && view[0] !== "data" ? html`<${NoRuns} root=${table.root} />`
          : html`<${view[2]} ...${shared} version=${selected.reduce((sum, name) => sum + grown(name), 0)} oneVersion=${grown(one)} />`}
      </main>
    </div>`;
}

/** The views; the current one is always in sight, also where not all fit. */
function Views({ here, state, set }) {
  const row = useRef(null);
  useEffect(() => {
    const scroll = () => {
      const { offsetLeft, offsetWidth } = row.current.querySelector(".here");
      row.current.scrollLeft = offsetLeft - row.current.offsetLeft - (row.current.clientWidth - offsetWidth) / 2;
    };
    scroll();
    const watcher = new ResizeObserver(scroll);
    watcher.observe(row.current);
    return () => watcher.disconnect();
  }, [here]);
  const go = (event, name) => { if (!event.ctrlKey && !event.metaKey) { event.preventDefault(); set({ view: name, full: null }); } };
  return html`<nav aria-label="views" ref=${row}>${VIEWS.map(([name, title], place) => html`
    <a href=${link({ ...state, view: name })} class=${here === name ? "here" : ""} aria-current=${here === name ? "page" : null}
      title=${place < 10 ? `key ${(place + 1) % 10}` : null} onClick=${(event) => go(event, name)}>${title}</a>`)}</nav>`;
}

/** Whether the server answers, and how many runs are training. */
function Live({ connected, runs }) {
  const training = runs.filter((run) => ["running", "starting"].includes(run.status)).length;
  const [kind, text] = !connected ? ["off", "offline"] : training ? ["on", `${training} running`] : ["idle", "nothing running"];
  return html`<span class=${`live ${kind}`} role="status" title=${connected ? "follows the run folders" : "the server does not answer"}>${text}</span>`;
}

function useTheme(asked) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = useState(system.matches);
  useEffect(() => {
    const change = () => setDark(system.matches);
    system.addEventListener("change", change);
    return () => system.removeEventListener("change", change);
  }, []);
  const theme = asked ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  return theme;
}

function NoRuns({ root }) {
  return html`<div class="empty"><h2>No runs yet</h2><p>There is no run folder in <code>${root}</code>.</p>
    <p>Start one, and it appears here by itself:</p><pre>nmoe run quickstart</pre></div>`;
}

function Keys({ close }) {
  const keys = [["1 … 0", "views"], ["/", "find runs"], ["l", "logarithmic or linear y"], ["r", "undo the zoom (or double-click)"],
    ["t", "light or dark"], ["⤢", "a chart over the whole screen"], ["drag", "zoom into a stretch, in every chart"], ["Esc", "close"]];
  return html`<div class="keys" role="dialog" aria-label="keys"><dl>${keys.map(([key, what]) => html`<dt>${key}</dt><dd>${what}</dd>`)}</dl>
    <button onClick=${close}>close</button></div>`;
}

render(html`<${App} />`, document.getElementById("app"));
