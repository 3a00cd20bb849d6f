// A chart: lines over a common axis, with bands, events, marks for what is not finite, a cursor that all charts share.
import { html, useEffect, useMemo, useRef } from "./vendor/preact-htm.mjs";
import { around, clockTexts, ordinary, tickPlaces, ticks } from "./axes.js";
import { EVENT_MARK, clock, count, hours, number } from "./format.js";
import { Legend, highlight, useHighlight } from "./legend.js";
import { css, drawEvents, drawNonfinite, png } from "./marks.js";

const NEAR_PX = 5;
const MAX_ROWS = 12;
const HEIGHT = 236;
const HIGHLIGHT_UP_TO = 50;

/** How the horizontal axes are called and read. */
export const X_AXES = {
  step: ["step", count], tokens: ["tokens", count], time: ["training time", hours], clock: ["wall clock", clock],
  flops: ["FLOPs", count],
};

/**
 * x        places, ascending
 * axis     a name of `X_AXES`
 * lines    [{name, values, low, high, error, under, colour, dash, nonfinite, last, min, max}]; `low`, `high`: a band;
 *          `error`: standard error of the last value; `under`: drawn faintly
 * best     "min" or "max": which value of a line is its best; "" where there is no better and worse
 * events   [{x, event, severity, text, run}]
 * fixed    [low, high] of the y axis; undefined: as the values ask for
 * least    lowest height of the y axis as a share of the values
 * all      whether the y axis reaches every value, also one far from the rest
 * onAll    asks for `all`
 * full     whether the chart fills the screen; `onFull` changes it
 * onZoom   called with the stretch that was drawn over, or nulls
 */
export function Chart(props) {
  const { title, unit, about, x, lines, logX, logY, axis, format = number, all, full, onFull, theme, best = "" } = props;
  const place = useRef(null);
  const held = useRef({ plot: null, shape: null });
  const input = useRef(null);
  const ends = useMemo(() => (logY || all || props.fixed ? null : ordinary(lines, props.least)), [lines, logY, all, props.fixed, props.least]);
  const lit = useHighlight();
  input.current = { ...props, format, ends };

  useEffect(() => {
    const node = place.current;
    const drawnBy = lines.map((line) => [line.name, line.colour, !!line.low, !!line.under, line.dash]);
    const shape = JSON.stringify([drawnBy, logX, logY, axis, theme]);
    const data = columns(x, lines, logY);
    const began = performance.now();
    if (held.current.plot && held.current.shape === shape) {
      held.current.plot.setData(data);
    } else {
      held.current.plot?.destroy();
      node.replaceChildren();
      held.current = { shape, plot: new uPlot(options(node, input, { logX, logY }), data, node) };
    }
    requestAnimationFrame(() => { node.dataset.drawn = String(performance.now() - began); });
  }, [x, lines, logX, logY, axis, theme, all, props.events, props.fixed?.[0], props.fixed?.[1]]);
  useEffect(() => {
    const fit = () => {
      const { plot } = held.current, [width, height] = room(place.current);
      if (width && plot && (width !== plot.width || height !== plot.height)) plot.setSize({ width, height });
    };
    fit();
    const watcher = new ResizeObserver(fit);
    watcher.observe(place.current);
    return () => watcher.disconnect();
  }, [full]);
  useEffect(() => () => { held.current.plot?.destroy(); held.current = { plot: null, shape: null }; }, []);
  useEffect(() => {
    const at = lines.findIndex((line) => line.name === lit);
    place.current.dataset.lit = at < 0 ? "" : lit;
    held.current.plot?.setSeries(at < 0 ? null : owners(lines)[at], { focus: true });
  }, [lit, lines]);

  return html`<figure class=${full ? "chart full" : "chart"} aria-label=${title}>
    <figcaption><span class="chart-title" title=${about ?? title}>${title}</span>
      ${unit ? html`<span class="chart-unit">${unit}</span>` : null}
      ${ends?.outside ? html`<button class="quiet beyond" title="show the values far from the rest, too"
        onClick=${() => props.onAll?.()}>${ends.outside} beyond the axis</button>` : null}
      <span class="chart-note">${note(lines, format)}</span>
      ${onFull ? html`<button class="quiet" title=${full ? "smaller (Esc)" : "fill the screen"} aria-pressed=${!!full}
        aria-label=${`${full ? "shrink" : "enlarge"} ${title}`} onClick=${() => onFull(!full)}>${full ? "⤡" : "⤢"}</button>` : null}
      <button class="quiet" title="save as PNG" aria-label=${`save ${title} as PNG`}
        onClick=${() => png(held.current.plot, title, lines)}>PNG</button></figcaption>
    <div class="plot" ref=${place}></div>
    ${lines.length > 1 ? html`<${Legend} lines=${lines} format=${format} best=${best} lit=${lit} />` : null}
  </figure>`;
}

/** What a chart says in its head: of a single line the last value. */
function note(lines, format) {
  const lost = lines.reduce((sum, line) => sum + (line.nonfinite?.length ?? 0), 0);
  const marks = lost ? `${lost} not finite ` : "";
  if (lines.length !== 1) return marks;
  const values = lines[0].under ?? lines[0].values;
  const last = lines[0].last ?? values.findLast((value) => value !== null);
  const error = typeof lines[0].error === "number" ? ` ± ${format(lines[0].error)}` : "";
  return marks + (last === undefined ? "" : format(last) + error);
}

/** Width and height there is for a plot. */
function room(node) {
  const full = node.closest(".full");
  if (!full) return [node.clientWidth, HEIGHT];
  const others = [...full.children].filter((child) => child !== node).reduce((sum, child) => sum + child.offsetHeight, 0);
  return [node.clientWidth, Math.max(HEIGHT, full.clientHeight - others - 30)];
}

function columns(x, lines, logY) {
  const safe = (values) => (logY ? values.map((value) => (value > 0 ? value : null)) : values);
  return [x, ...lines.flatMap((line) => [
    ...(line.low ? [safe(line.high), safe(line.low)] : []),
    ...(line.under ? [safe(line.under)] : []),
    safe(line.values),
  ])];
}

/** The series of each line's own values; a band and what lies under it come before. */
function owners(lines) {
  let series = 0;
  return lines.map((line) => (series += 1 + (line.low ? 2 : 0) + (line.under ? 1 : 0)));
}

function options(node, input, { logX, logY }) {
  const { lines, axis: kind } = input.current;
  const grid = { stroke: css("--line"), width: 1 };
  const axis = { stroke: css("--soft"), grid, ticks: grid, font: "11px system-ui, sans-serif" };
  const [xName, xFormat] = X_AXES[kind];
  const series = [{}];
  const bands = [];
  for (const line of lines) {
    const base = { spanGaps: true, points: { show: false } };
    if (line.low) {
      bands.push({ series: [series.length, series.length + 1], fill: `${line.colour}2b` });
      series.push({ ...base, width: 0, stroke: "transparent" }, { ...base, width: 0, stroke: "transparent" });
    }
    if (line.under) series.push({ ...base, width: 1, stroke: `${line.colour}55` });
    series.push({
      ...base, label: line.name, stroke: line.colour, width: 1.6, dash: line.dash,
      points: { show: line.values.filter((value) => value !== null).length < 3, size: 6, fill: line.colour },
    });
  }
  // What an axis says is also an attribute, for those who cannot see the picture.
  const said = (name, texts) => { node.dataset[name] = texts.filter(Boolean).join(" | "); return texts; };
  const xTexts = (u, all) => said("x", kind === "clock" && !logX ? clockTexts(all) : ticks(all, !logX, xFormat));
  const yTexts = (u, all) => said("y", ticks(all, !logY, input.current.format));
  const [width, height] = room(node);
  return {
    width: width || 400, height, series, bands,
    padding: [10, 18, 0, 0],
    legend: { show: false },
    focus: { alpha: 0.25 },
    cursor: {
      sync: { key: kind, scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 5 },
      focus: { prox: lines.length > 1 && lines.length <= HIGHLIGHT_UP_TO ? 16 : -1 },
    },
    scales: {
      x: { time: kind === "clock", distr: logX ? 3 : 1 },
      y: { distr: logY ? 3 : 1, range: logY ? undefined : (u, low, high) => span(input.current, low, high) },
    },
    axes: [
      {
        ...axis, size: 30, label: xName, labelSize: 16, labelFont: axis.font,
        values: xTexts, splits: logX ? undefined : tickPlaces(xFormat),
      },
      {
        ...axis, values: yTexts, splits: logY ? undefined : tickPlaces(input.current.format),
        size: (u, texts) => 20 + 6.4 * Math.max(3, ...(texts ?? []).map((each) => each.length)),
      },
    ],
    hooks: {
      draw: [(u) => { drawEvents(u, input.current.events ?? []); drawNonfinite(u, input.current.lines); }],
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        const low = u.posToVal(u.select.left, "x"), high = u.posToVal(u.select.left + u.select.width, "x");
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        input.current.onZoom?.(low, high);
      }],
      setSeries: [(u, at) => {
        if (!u.over.matches(":hover")) return;
        const line = at === null ? undefined : input.current.lines[owners(input.current.lines).findIndex((own) => own >= at)];
        highlight(line?.name ?? null);
      }],
      ready: [(u) => {
        u.over.addEventListener("dblclick", () => input.current.onZoom?.(null, null));
        const box = document.createElement("div");
        box.className = "tip";
        box.hidden = true;
        u.over.append(box);
        u.over.addEventListener("mouseleave", () => { box.hidden = true; highlight(null); });
        u.over.addEventListener("mousemove", () => tip(u, box, input.current));
      }],
    },
  };
}

/** Ends of the y axis, given those of everything that is drawn. */
function span({ fixed, ends, least = 0 }, low, high) {
  if (fixed) return fixed;
  return ends && low !== null ? around(ends.low, ends.high, least) : around(low, high, least);
}

function tip(u, box, { x, lines, events = [], format, axis }) {
  const at = u.cursor.idx;
  if (at === null || at === undefined) { box.hidden = true; return; }
  const series = owners(lines);
  const value = (place) => u.data[series[place]][u.cursor.idxs?.[series[place]] ?? at];
  const rows = lines.map((line, place) => ({ line, value: value(place) }))
    .filter((row) => row.value !== null && row.value !== undefined);
  const y = u.posToVal(u.cursor.top, "y");
  rows.sort((a, b) => Math.abs(a.value - y) - Math.abs(b.value - y));
  const shown = rows.slice(0, MAX_ROWS).sort((a, b) => b.value - a.value);
  const parts = [text("div", "tip-x", `${X_AXES[axis][0]} ${X_AXES[axis][1](x[at])}`)];
  for (const { line, value } of shown) {
    const row = text("div", "tip-row", "");
    const swatch = text("span", "swatch", "");
    swatch.style.background = line.colour;
    row.append(swatch, text("span", "tip-name", line.name), text("span", "tip-value", format(value)));
    parts.push(row);
  }
  if (rows.length > MAX_ROWS) parts.push(text("div", "tip-x", `and ${rows.length - MAX_ROWS} more`));
  for (const event of events) {
    if (event.x !== null && Math.abs(u.valToPos(event.x, "x") - u.cursor.left) < NEAR_PX) {
      const said = `${EVENT_MARK[event.event] ?? "•"} ${event.event} ${event.text}`.slice(0, 120);
      parts.push(text("div", `tip-event ${event.severity}`, said));
    }
    if (parts.length > MAX_ROWS + 6) break;
  }
  box.replaceChildren(...parts);
  box.hidden = false;
  const right = u.cursor.left > u.over.clientWidth / 2;
  box.style.left = right ? "" : `${u.cursor.left + 14}px`;
  box.style.right = right ? `${u.over.clientWidth - u.cursor.left + 14}px` : "";
}

function text(tag, kind, content) {
  const node = document.createElement(tag);
  node.className = kind;
  node.textContent = content;
  return node;
}
