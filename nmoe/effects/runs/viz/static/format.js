// Numbers, times and colours as people read them.
export const NONE = "–";

export const UNITS = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
export const BYTES = ["PB", "TB", "GB", "MB", "kB"].map((name, place) => [10 ** (15 - 3 * place), name]);

/** Size and name of the largest unit that a value reaches; no name where it reaches none. */
export function unitOf(value, units) {
  return units.find(([size]) => Math.abs(value) >= size * 0.9995) ?? [1, ""];
}

/** A number of tokens, steps or FLOPs: as it is below 10,000, else with four digits and a unit, as in `3.67 B`. */
export function count(value) {
  if (value === null || value === undefined) return NONE;
  if (typeof value === "string") return value;
  if (Math.abs(value) < 9999.5) return trimmed(value, 4);
  const [size, name] = unitOf(value, UNITS);
  return `${trimmed(value / size, 4)} ${name}`;
}

/** Bytes as the terminal has them: three digits and a decimal unit, as in `31.8 MB`. */
export function bytes(value) {
  if (typeof value !== "number") return number(value);
  const [size, name] = unitOf(value, BYTES);
  return `${trimmed(value / size, 3)} ${name || "B"}`;
}

function trimmed(value, digits) {
  return Number.isInteger(value) && Math.abs(value) < 1e6 ? String(value) : String(Number(value.toPrecision(digits)));
}

/** A measured number: enough digits to compare, exponents only where needed. */
export function number(value, digits = 4) {
  if (value === null || value === undefined) return NONE;
  if (typeof value === "string") return { nan: "NaN", inf: "∞", "-inf": "−∞" }[value] ?? value;
  if (typeof value !== "number") return String(value);
  if (value === 0 || Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1e6) return count(value);
  if (size < 1e-3) return value.toExponential(2);
  return value.toFixed(size >= 1000 ? 1 : size >= 100 ? Math.min(digits, 2) : digits);
}

/** A time given in hours, in the unit that fits. */
export function hours(value) {
  return value === null || value === undefined ? NONE : duration(3600 * value);
}

export function percent(value) {
  return typeof value === "number" ? `${(100 * value).toFixed(1)} %` : number(value);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  const [h, m] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  return h ? `${h} h ${String(m).padStart(2, "0")} min` : `${m} min ${String(s % 60).padStart(2, "0")} s`;
}

export function clock(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const at = new Date(seconds * 1000);
  const two = (each) => String(each).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

export function ago(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const past = Date.now() / 1000 - seconds;
  if (past < 60) return "just now";
  if (past < 5400) return `${Math.round(past / 60)} min ago`;
  if (past < 129600) return `${Math.round(past / 3600)} h ago`;
  return `${Math.round(past / 86400)} d ago`;
}

/** By the names that the server gives a format. */
export const FORMATS = { number, count, bytes, percent, duration, ago };

// Okabe and Ito's colours, which most colour-blind people tell apart; dashes tell the rest.
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#3a9bd9", "#8a5a00", "#555555"],
  dark: ["#56b4e9", "#f0803c", "#20c997", "#e29fc6", "#f0b429", "#8ab8ff", "#d9b38c", "#b8bcc2"],
};
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

export const theme = () => document.documentElement.dataset.theme;
export const colour = (place) => COLOURS[theme()][place % 8];
export const dash = (place) => DASHES[Math.floor(place / 8) % DASHES.length];

// Stops of viridis: even steps of brightness, safe for colour-blind eyes and in print.
const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

/** The part of the scale that has a contrast of 3 with a card of the theme: its dark end is lost on dark, its bright one on white. */
export const visible = (name) => (name === "dark" ? [0.4, 1] : [0, 0.58]);

export function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((from, place) => Math.round(from + (STOPS[low + 1][place] - from) * (at - low)));
}

export const hex = (parts) => `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}`;

export const STATUS = {
  running: "●", starting: "◌", finished: "✓", interrupted: "‖", failed: "✕", crashed: "✕", lost: "?", "not started": "○",
};
export const EVENT_MARK = {
  checkpoint: "◆", resume: "↻", rewind: "↶", spike: "^", start: "▶", end: "■", validation: "▾", evaluation: "▾", nonfinite: "✕", alert: "!",
  sample: "¶",
};

/** Saves what a page has made, under a name. */
export function save(blob, name) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
}
