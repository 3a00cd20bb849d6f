// The page: its address, the list of runs, the views.
import { html, render, useEffect, useMemo, useRef, useState } from "./vendor/preact-htm.mjs";
import { address, useAnswer, watch } from "./api.js";
import { link, read, write } from "./state.js";
import { STATUS, bytes, colour, duration } from "./format.js";
import { RunsView } from "./runs.js";
import { ChartsView } from "./charts.js";
import { ExpertsView } from "./experts.js";
import { GpusView, TimingView } from "./machine.js";
import { ConfigsView, EvaluationsView, EventsView, SamplesView } from "./results.js";
import { DataView } from "./data.js";

const VIEWS = [
  ["runs", "Runs", RunsView], ["charts", "Charts", ChartsView], ["experts", "Experts", ExpertsView],
  ["timing", "Timing", TimingView], ["gpus", "GPUs", GpusView], ["evaluations", "Evaluations", EvaluationsView],
  ["events", "Events", EventsView], ["configs", "Configs", ConfigsView], ["samples", "Samples", SamplesView],
  ["data", "Data", DataView],
];
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

function App() {
  const [state, set] = useAddress();
  const growth = useGrowth();
  const [open, setOpen] = useState(false);
  const [help, setHelp] = useState(false);
  const theme = useTheme(state.theme);
  const filter = useRef(null);
  const answer = useAnswer("Runs", address("runs", { column: [...(state.col ?? []), ...(state.group ? [state.group] : [])] }), growth.version);
  const table = answer.data;
  const runs = table ? table.runs : [];
  const selected = useMemo(() => chosen(state, runs), [state.run, table]);
  const places = useMemo(() => new Map(runs.map((run, place) => [run.name, runs.length - 1 - place])), [table]);
  const view = VIEWS.find(([name]) => name === state.view) ?? VIEWS[0];
  const one = selected.includes(state.one) ? state.one : selected[0];
  const toggle = (name) => {
    const next = selected.includes(name) ? selected.filter((each) => each !== name) : [...selected, name];
    set({ run: next.length ? next : ["-"] });
  };

  useEffect(() => {
    const press = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") { setHelp(false); setOpen(false); event.target.blur?.(); return; }
      if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
      const digit = "1234567890".indexOf(event.key);
      if (digit >= 0 && digit < VIEWS.length) set({ view: VIEWS[digit][0] });
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
  const shared = { state, set, growth, table, runs, selected, places, one, theme, toggle };
  const grown = (name) => growth.runs[name] ?? 0;
  return html`
    <header>
      <button class="quiet menu" aria-label="list of runs" aria-expanded=${open} onClick=${() => setOpen(!open)}>☰</button>
      <a class="brand" href="/"><img src="/static/icon.svg" alt="" width="22" height="22" />nmoe</a>
      <nav aria-label="views">${VIEWS.map(([name, title], place) => html`
        <a href=${link({ ...state, view: name })} class=${view[0] === name ? "here" : ""} aria-current=${view[0] === name ? "page" : null}
          title=${`key ${(place + 1) % 10}`}
          onClick=${(event) => { if (!event.ctrlKey && !event.metaKey) { event.preventDefault(); set({ view: name }); } }}>${title}</a>`)}
      </nav>
      <span class=${growth.connected ? "live" : "live off"} title=${growth.connected ? "live" : "no connection"}>${growth.connected ? "live" : "offline"}</span>
      <button class="quiet" aria-label="light or dark" title="light or dark (t)" onClick=${() => set({ theme: theme === "dark" ? "light" : "dark" })}>◐</button>
      <button class="quiet" aria-label="keys" title="keys (?)" onClick=${() => setHelp(!help)}>?</button>
    </header>
    ${problems.length ? html`<div class="problems" role="alert">${problems.map((each) => html`<div>${each}</div>`)}</div>` : null}
    ${growth.left ? html`<div class="progress" role="status">reading the runs: ${bytes(growth.left)} left${growth.leftS ? `, about ${duration(growth.leftS)}` : ""}</div>` : null}
    ${help ? html`<${Keys} close=${() => setHelp(false)} />` : null}
    <div class="body">
      <aside class=${open ? "open" : ""} aria-label="runs">
        <${RunList} ...${shared} filter=${filter} />
      </aside>
      <main onClick=${() => open && setOpen(false)}>
        ${table === null ? html`<p class="empty">${answer.problem ? "" : "loading"}</p>`
          : runs.length === 0 && view[0] !== "data" ? html`<${NoRuns} root=${table.root} />`
          : html`<${view[2]} ...${shared} version=${selected.reduce((sum, name) => sum + grown(name), 0)} oneVersion=${grown(one)} />`}
      </main>
    </div>`;
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

function RunList({ state, set, runs, selected, places, toggle, filter }) {
  const wanted = (state.find ?? "").toLowerCase();
  const shown = runs.filter((run) => `${run.name} ${run.status}`.toLowerCase().includes(wanted));
  return html`
    <input type="search" ref=${filter} placeholder="find runs  ( / )" aria-label="find runs" value=${state.find ?? ""}
      onInput=${(event) => set({ find: event.target.value })} />
    <div class="list-tools">
      <button class="quiet" onClick=${() => set({ run: wanted ? shown.map((run) => run.name) : ["*"] })}>show all</button>
      <button class="quiet" onClick=${() => set({ run: ["-"] })}>none</button>
      <button class="quiet" onClick=${() => set({ run: null })}>newest</button>
      <span>${selected.length} of ${runs.length}</span>
    </div>
    <ul>${shown.map((run) => html`<li key=${run.name}>
      <label title=${`${run.name}: ${run.status}`}><input type="checkbox" checked=${selected.includes(run.name)} onChange=${() => toggle(run.name)} />
        <span class="swatch" style=${{ background: selected.includes(run.name) ? colour(places.get(run.name)) : "transparent" }}></span>
        <span class="run-name">${run.name}</span>
        <span class=${`status ${run.status.split(",")[0].replace(" ", "-")}`} aria-label=${run.status}>${STATUS[run.status] ?? "?"}</span>
      </label>
      <button class="quiet only" title="show this one alone" onClick=${() => set({ run: [run.name] })}>only</button></li>`)}
    </ul>`;
}

function NoRuns({ root }) {
  return html`<div class="empty"><h2>No runs yet</h2><p>There is no run folder in <code>${root}</code>.</p>
    <p>Start one, and it appears here by itself:</p><pre>nmoe run quickstart</pre></div>`;
}

function Keys({ close }) {
  const keys = [["1 … 0", "views"], ["/", "find runs"], ["l", "logarithmic or linear y"], ["r", "undo the zoom (or double-click)"],
    ["t", "light or dark"], ["drag", "zoom into a stretch, in every chart"], ["Esc", "close"]];
  return html`<div class="keys" role="dialog" aria-label="keys"><dl>${keys.map(([key, what]) => html`<dt>${key}</dt><dd>${what}</dd>`)}</dl>
    <button onClick=${close}>close</button></div>`;
}

render(html`<${App} />`, document.getElementById("app"));
