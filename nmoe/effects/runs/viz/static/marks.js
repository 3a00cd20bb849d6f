// What is drawn over the curves of a chart: events, places that are not finite; and the chart as a picture.
import { EVENT_MARK, save } from "./format.js";

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export function drawEvents(u, events) {
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

export function drawNonfinite(u, lines) {
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

/** Saves a chart with its legend. */
export function png(plot, title, lines) {
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
