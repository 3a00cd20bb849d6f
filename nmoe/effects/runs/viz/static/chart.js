// A chart: lines over a common axis, with bands, events, marks for what is not finite, a cursor that all charts share.
import { html, useEffect, useRef } from "./vendor/preact-htm.mjs";
import { EVENT_MARK, bytes, count, number, save } from "./format.js";

const NEAR_PX = 5;
const MAX_ROWS = 12;

/**
 * x        places, ascending
 * lines    [{name, values, low, high, under, colour, dash, nonfinite, last}]; `low`, `high`: a band; `under`: drawn faintly
 * events   [{x, event, severity, text, run}]
 * onZoom   called with the stretch that was drawn over, or nulls
 */
export function Chart({ title, about, x, lines, events = [], logX, logY, xName, format = number, onZoom, sync, theme }) {
  const place = useRef(null);
  const held = useRef({ plot: null, shape: null });
  const input = useRef(null);
  input.current = { x, lines, events, format, xName, onZoom };

  useEffect(() => {
    const node = place.current;
    const shape = JSON.stringify([lines.map((l) => [l.name, l.colour, !!l.low, !!l.under, l.dash]), logX, logY, xName, theme]);
    const data = columns(x, lines, logY);
    const began = performance.now();
    if (held.current.plot && held.current.shape === shape) {
      held.current.plot.setData(data);
    } else {
      held.current.plot?.destroy();
      node.replaceChildren();
      held.current = { shape, plot: new uPlot(options(node, input, { logX, logY, sync }), data, node) };
    }
    requestAnimationFrame(() => { node.dataset.drawn = String(performance.now() - began); });
  });
  useEffect(() => {
    const watcher = new ResizeObserver(() => {
      const width = place.current?.clientWidth;
      if (width && held.current.plot && width !== held.current.plot.width) held.current.plot.setSize({ width, height: 230 });
    });
    watcher.observe(place.current);
    return () => { watcher.disconnect(); held.current.plot?.destroy(); held.current = { plot: null, shape: null }; };
  }, []);

  return html`<figure class="chart" aria-label=${title}>
    <figcaption><span class="chart-title" title=${about ?? title}>${title}</span>
      <span class="chart-note">${note(lines, format)}</span>
      <button class="quiet" title="save as PNG" aria-label=${`save ${title} as PNG`}
        onClick=${() => png(held.current.plot, title, lines)}>PNG</button></figcaption>
    <div class="plot" ref=${place}></div>
  </figure>`;
}

/** What a chart of a single line says in its head: the last value. */
function note(lines, format) {
  const lost = lines.reduce((sum, line) => sum + (line.nonfinite?.length ?? 0), 0);
  const marks = lost ? `${lost} not finite ` : "";
  if (lines.length !== 1) return marks;
  const values = lines[0].under ?? lines[0].values;
  const last = lines[0].last ?? values.findLast((value) => value !== null);
  return marks + (last === undefined ? "" : format(last));
}

function columns(x, lines, logY) {
  const safe = (values) => (logY ? values.map((value) => (value > 0 ? value : null)) : values);
  return [x, ...lines.flatMap((line) => [
    ...(line.low ? [safe(line.high), safe(line.low)] : []),
    ...(line.under ? [safe(line.under)] : []),
    safe(line.values),
  ])];
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function options(node, input, { logX, logY, sync }) {
  const { lines, xName } = input.current;
  const grid = { stroke: css("--line"), width: 1 };
  const axis = { stroke: css("--soft"), grid, ticks: grid, font: "11px system-ui, sans-serif", size: 34 };
  const series = [{}];
  const bands = [];
  const owner = [];
  for (const line of lines) {
    const base = { spanGaps: true, points: { show: false } };
    if (line.low) {
      bands.push({ series: [series.length, series.length + 1], fill: `${line.colour}2b` });
      series.push({ ...base, width: 0, stroke: "transparent" }, { ...base, width: 0, stroke: "transparent" });
    }
    if (line.under) series.push({ ...base, width: 1, stroke: `${line.colour}55` });
    owner.push(series.length);
    series.push({
      ...base, label: line.name, stroke: line.colour, width: 1.6, dash: line.dash,
      points: { show: line.values.filter((value) => value !== null).length < 3, size: 6, fill: line.colour },
    });
  }
  return {
    width: node.clientWidth || 400, height: 230, series, bands,
    padding: [10, 12, 0, 0],
    legend: { show: false },
    cursor: { sync: sync ? { key: sync, scales: ["x", null] } : undefined, drag: { x: true, y: false }, points: { size: 5 } },
    scales: {
      x: { time: false, distr: logX ? 3 : 1 },
      y: { distr: logY ? 3 : 1, range: logY ? undefined : (u, low, high) => span(low, high) },
    },
    axes: [
      { ...axis, values: (u, all) => all.map((value) => (value === null ? "" : count(value))) },
      { ...axis, size: input.current.format === bytes ? 76 : 64, values: (u, all) => all.map((value) => (value === null ? "" : input.current.format === bytes ? bytes(value) : short(value))) },
    ],
    hooks: {
      draw: [(u) => { drawEvents(u, input.current.events); drawNonfinite(u, input.current.lines); }],
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        const low = u.posToVal(u.select.left, "x"), high = u.posToVal(u.select.left + u.select.width, "x");
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        input.current.onZoom?.(low, high);
      }],
      ready: [(u) => {
        u.over.addEventListener("dblclick", () => input.current.onZoom?.(null, null));
        const box = document.createElement("div");
        box.className = "tip";
        box.hidden = true;
        u.over.append(box);
        u.over.addEventListener("mouseleave", () => { box.hidden = true; });
        u.over.addEventListener("mousemove", () => tip(u, box, input.current, owner));
      }],
    },
    xName,
  };
}

function span(low, high) {
  if (low === null || high === null) return [0, 1];
  if (high - low <= 1e-9 * Math.abs(high)) return [low - Math.abs(low) * 0.1 - 1e-12, high + Math.abs(high) * 0.1 + 1e-12];
  const edge = (high - low) * 0.05;
  return [low >= 0 && low - edge < 0 ? 0 : low - edge, high + edge];
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e4 ? count(value) : size < 1e-3 ? value.toExponential(0).replace("e+", "e") : String(Number(value.toPrecision(4)));
}

function tip(u, box, { x, lines, events, format, xName }, owner) {
  const at = u.cursor.idx;
  if (at === null || at === undefined) { box.hidden = true; return; }
  const rows = lines.map((line, place) => ({ line, value: u.data[owner[place]][u.cursor.idxs?.[owner[place]] ?? at] }))
    .filter((row) => row.value !== null && row.value !== undefined);
  const y = u.posToVal(u.cursor.top, "y");
  rows.sort((a, b) => Math.abs(a.value - y) - Math.abs(b.value - y));
  const shown = rows.slice(0, MAX_ROWS).sort((a, b) => b.value - a.value);
  const parts = [text("div", "tip-x", `${xName} ${xName === "hours" ? number(x[at], 3) : count(x[at])}`)];
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
      parts.push(text("div", `tip-event ${event.severity}`, `${EVENT_MARK[event.event] ?? "•"} ${event.event} ${event.text}`.slice(0, 120)));
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

function drawEvents(u, events) {
  const { ctx } = u;
  const ratio = devicePixelRatio || 1;
  const colours = { info: css("--soft"), warning: css("--warn"), error: css("--bad") };
  ctx.save();
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  let last = -Infinity;
  for (const event of [...events].filter((each) => each.x !== null).sort((a, b) => a.x - b.x)) {
    const left = u.valToPos(event.x, "x", true);
    if (left < u.bbox.left || left > u.bbox.left + u.bbox.width) continue;
    if (event.severity === "info" && left - last < 14 * ratio) continue;
    last = left;
    ctx.strokeStyle = ctx.fillStyle = colours[event.severity];
    ctx.globalAlpha = event.severity === "info" ? 0.45 : 0.9;
    ctx.lineWidth = ratio;
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    ctx.beginPath();
    ctx.moveTo(left, u.bbox.top + 4 * ratio);
    ctx.lineTo(left, u.bbox.top + u.bbox.height);
    ctx.stroke();
    ctx.globalAlpha = 1;
    ctx.fillText(EVENT_MARK[event.event] ?? "•", left, u.bbox.top + 2 * ratio);
  }
  ctx.restore();
}

function drawNonfinite(u, lines) {
  const { ctx } = u;
  const ratio = devicePixelRatio || 1;
  ctx.save();
  ctx.strokeStyle = css("--bad");
  ctx.lineWidth = 2 * ratio;
  for (const line of lines) {
    for (const x of line.nonfinite ?? []) {
      const left = u.valToPos(x, "x", true);
      if (left < u.bbox.left || left > u.bbox.left + u.bbox.width) continue;
      const bottom = u.bbox.top + u.bbox.height - 6 * ratio, size = 4 * ratio;
      ctx.beginPath();
      ctx.moveTo(left - size, bottom - size); ctx.lineTo(left + size, bottom + size);
      ctx.moveTo(left + size, bottom - size); ctx.lineTo(left - size, bottom + size);
      ctx.stroke();
    }
  }
  ctx.restore();
}

function png(plot, title, lines) {
  if (!plot) return;
  const ratio = devicePixelRatio || 1;
  const source = plot.ctx.canvas;
  const named = lines.slice(0, 12);
  const canvas = document.createElement("canvas");
  canvas.width = source.width;
  canvas.height = source.height + (34 + 16 * named.length) * ratio;
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = css("--card");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = css("--text");
  ctx.font = `600 ${13 * ratio}px system-ui, sans-serif`;
  ctx.fillText(title, 10 * ratio, 20 * ratio);
  ctx.drawImage(source, 0, 30 * ratio);
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  named.forEach((line, place) => {
    const top = source.height + (42 + 16 * place) * ratio;
    ctx.fillStyle = line.colour;
    ctx.fillRect(12 * ratio, top - 8 * ratio, 10 * ratio, 10 * ratio);
    ctx.fillStyle = css("--text");
    ctx.fillText(line.name, 28 * ratio, top);
  });
  canvas.toBlob((blob) => save(blob, `${title.replaceAll(/[^\w.-]+/g, "-")}.png`));
}
