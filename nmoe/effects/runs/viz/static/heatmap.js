// A heat map on a canvas: rows by columns, colour by value.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.mjs";
import { css } from "./marks.js";
import { save } from "./format.js";

const TOP_SHARE = 3;
const LEFT = 46, BOTTOM = 30, TOP = 4, RIGHT = 8;

/**
 * rows, columns   names along the axes
 * values          [rows][columns]
 * values are shares of the mean: 1 is balanced; the colours are the same in every map
 * describe        (row, column) -> the text beside the cursor
 */
export function Heatmap({ title, rows, columns, values, rowName, columnName, describe, theme }) {
  const place = useRef(null);
  const [over, setOver] = useState(null);
  const height = Math.min(420, Math.max(110, rows.length * 18)) + TOP + BOTTOM;

  useEffect(() => {
    const paint = () => draw(place.current, { rows, columns, values, rowName, columnName, height });
    paint();
    const watcher = new ResizeObserver(paint);
    watcher.observe(place.current.parentElement);
    return () => watcher.disconnect();
  }, [rows, columns, values, theme, height]);

  const move = (event) => {
    const box = place.current.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * columns.length);
    const row = Math.floor(((event.clientY - box.top - TOP) / (box.height - TOP - BOTTOM)) * rows.length);
    const inside = row >= 0 && row < rows.length && column >= 0 && column < columns.length;
    setOver(inside ? { row, column } : null);
  };
  return html`<figure class="chart wide" aria-label=${title}>
    <figcaption><span class="chart-title">${title}</span>
      <span class="chart-note">${over ? describe(over.row, over.column) : ""}</span>
      <button class="quiet" title="save as PNG" onClick=${() => place.current.toBlob((blob) => save(blob, `${title}.png`))}>PNG</button>
    </figcaption>
    <div class="heat"><canvas ref=${place} onMouseMove=${move} onMouseLeave=${() => setOver(null)} role="img"
      aria-label=${`${title}: ${rows.length} rows, ${columns.length} columns`}></canvas></div>
    <div class="heat-key"><span class="dead-key"></span>none <span class="ramp"></span>
      <span>0 · 1, balanced · ${TOP_SHARE} or more × the mean load</span></div>
  </figure>`;
}

const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** Colour of a share of the mean: from one end at 0 over the middle at 1 to the other end at `TOP_SHARE`. */
function shade(value, [under, even, over]) {
  const [from, to, at] = value < 1 ? [under, even, value] : [even, over, Math.min(1, (value - 1) / (TOP_SHARE - 1))];
  return `rgb(${from.map((part, place) => Math.round(part + (to[place] - part) * at))})`;
}

function draw(canvas, { rows, columns, values, rowName, columnName, height }) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  ctx.fillStyle = css("--card");
  ctx.fillRect(0, 0, width, height);
  const w = (width - LEFT - RIGHT) / columns.length, h = (height - TOP - BOTTOM) / rows.length;
  const gap = w > 6 && h > 6 ? 1 : 0;
  const stops = ["--under", "--even", "--over"].map((name) => parts(css(name)));
  const dead = css("--dead");
  values.forEach((line, row) => line.forEach((value, column) => {
    ctx.fillStyle = value === 0 ? dead : shade(value, stops);
    ctx.fillRect(LEFT + column * w, TOP + row * h, Math.max(w - gap, 1), Math.max(h - gap, 1));
  }));
  ctx.fillStyle = css("--soft");
  ctx.font = "11px system-ui, sans-serif";
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  const every = Math.ceil(14 / h);
  rows.forEach((name, row) => { if (row % every === 0) ctx.fillText(name, LEFT - 6, TOP + (row + 0.5) * h); });
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  const each = Math.ceil(columns.length / Math.max(1, Math.floor((width - LEFT) / 52)));
  columns.forEach((name, column) => {
    if (column % each === 0) ctx.fillText(name, LEFT + (column + 0.5) * w, height - BOTTOM + 4);
  });
  ctx.textAlign = "left";
  ctx.fillText(`${rowName} ↓   ${columnName} →`, LEFT, height - 12);
}
