// What the axes of charts say: ticks that differ, all in one unit, and ends that one outlier does not stretch.
import { BYTES, UNITS, bytes, clock, hours, number, percent, unitOf } from "./format.js";

const TIMES = [[24, "d"], [1, "h"], [1 / 60, "min"], [1 / 3600, "s"]];
const SIXTIES = [1, 2, 5, 10, 15, 30];
const HOUR_STEPS = [
  ...SIXTIES.map((seconds) => seconds / 3600), ...SIXTIES.map((minutes) => minutes / 60),
  1, 2, 3, 6, 12, 24, 48, 120, 240, 480, 1200, 2400,
];

/** Where ticks lie, so that they are whole in the unit people read; undefined leaves the choice to the chart. */
export function tickPlaces(format) {
  if (format !== hours) return undefined;
  return (u, axis, low, high, step, space) => evenPlaces(HOUR_STEPS, low, high, space && (high - low) / step * space);
}

/** Multiples of the smallest of `steps` that leaves 50 pixels between two of them. */
function evenPlaces(steps, low, high, pixels) {
  const step = steps.find((each) => (high - low) / each <= Math.max(2, pixels / 50)) ?? steps.at(-1);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return [...Array(Math.max(0, last - first + 1)).keys()].map((place) => (first + place) * step);
}

/**
 * The texts of an axis' ticks.
 * values  null for a tick without a text
 * even    whether the ticks lie at even distances, as on an axis without a logarithm
 */
export function ticks(values, even, format) {
  const step = even && values.length > 1 ? values[1] - values[0] : null;
  const top = values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);
  const text = step ? evenText(step, top, format) : format;
  return values.map((value) => (value === null ? "" : value === 0 ? "0" : text(value)));
}

/** The texts of ticks of a wall clock: the time of day, and under the first one of each day its date. */
export function clockTexts(seconds) {
  let before = "";
  return seconds.map((at) => {
    const [day, time] = clock(at).split(" ");
    const text = day === before ? "" : day;
    before = day;
    return `${time.endsWith(":00") ? time.slice(0, 5) : time}\n${text}`.trimEnd();
  });
}

function evenText(step, top, format) {
  if (format === percent) return (value) => `${(100 * value).toFixed(digitsOf(100 * step))} %`;
  if (format === hours) return inUnit(TIMES.find(([size]) => isWhole(step / size)) ?? TIMES.at(-1), step);
  if (format === bytes) return inUnit(top < 999.5 ? [1, "B"] : unitOf(top, BYTES), step);
  if (top < 1e-3) return (value) => value.toExponential(Math.max(0, tens(value) - tens(step)));
  return inUnit(top < 9999.5 ? [1, ""] : unitOf(top, UNITS), step);
}

function inUnit([size, name], step) {
  const digits = digitsOf(step / size);
  return (value) => `${(value / size).toFixed(digits)} ${name}`.trim();
}

const isWhole = (value) => value > 0.5 && Math.abs(value - Math.round(value)) < 1e-6;
const tens = (value) => Math.floor(Math.log10(Math.abs(value)) + 1e-9);

/** Digits after the point that multiples of `step` have. */
function digitsOf(step) {
  return [0, 1, 2, 3, 4, 5].find((digits) => isWhole(step * 10 ** digits)) ?? 6;
}

/**
 * Ends of the y axis without what lies far from the rest: further beyond the middle 90 % of a line's values than 4
 * times their spread, or further beyond the median line than 4 times its height. The middle of each line is inside.
 * lines    [{values, low, high}], with null for no value
 * least    lowest height of the axis, as of `around`
 * returns  {low, high, outside}: ends, and how many values lie beyond the axis that is made of them; null where nothing
 *          lies far away
 */
export function ordinary(lines, least = 0) {
  const ranges = lines.map((line) => own(line.values)).filter((range) => range !== null);
  if (!ranges.length) return null;
  const lower = (values) => values.sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];
  const heights = ranges.map((range) => range.high - range.low).filter((height) => height > 0);
  const reach = heights.length ? 4 * lower(heights) : Infinity; // one value has no height, and says nothing of the others
  const top = lower(ranges.map((range) => range.high)) + reach, bottom = -lower(ranges.map((range) => -range.low)) - reach;
  const ceiling = Math.max(top, ...ranges.map((range) => range.median));
  const floor = Math.min(bottom, ...ranges.map((range) => range.median));
  let low = Infinity, high = -Infinity;
  for (const range of ranges) {
    const inside = range.values.filter((value) => value >= Math.max(range.low, floor) && value <= Math.min(range.high, ceiling));
    low = Math.min(low, inside[0]);
    high = Math.max(high, inside.at(-1));
  }
  const [bottomOfAxis, topOfAxis] = around(low, high, least);
  const beyond = (values) => values.reduce((sum, value) => sum + (value < bottomOfAxis || value > topOfAxis), 0);
  const outside = ranges.reduce((sum, range) => sum + beyond(range.values), 0);
  const far = 4 * (high - low);
  const spikes = lines.some((line) => line.low?.some((value) => value !== null && value < low - far)
    || line.high?.some((value) => value !== null && value > high + far));
  return outside || (far > 0 && spikes) ? { low, high, outside } : null;
}

/** A line's values in order, and their ends without what lies far from their middle; null where it has none. */
function own(all) {
  const values = Float64Array.from(all.filter((value) => value !== null)).sort();
  if (!values.length) return null;
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const reach = 4 * (at(0.95) - at(0.05)) || Infinity;
  return {
    values, median: at(0.5),
    low: Math.max(values[0], at(0.05) - reach), high: Math.min(values.at(-1), at(0.95) + reach),
  };
}

/**
 * Room around the lowest and highest value. What is not negative does not get a negative axis.
 * least  lowest height of the axis as a share of the values: a constant with noise stays a line
 */
export function around(low, high, least) {
  if (low === null || high === null) return [0, 1];
  if (low === 0 && high === 0) return [0, 1];
  const size = Math.max(Math.abs(low), Math.abs(high));
  const wanted = high - low <= 1e-9 * size ? Math.max(least, 0.2) : least;
  const edge = 0.05 * (high - low) + Math.max(0, wanted * size - (high - low)) / 2;
  return [low >= 0 && low < edge ? 0 : low - edge, high + edge];
}

/** Where values lie between two ends of the picture, which value lies where, and about five ticks; on a logarithm only if all are positive. */
export function scale(values, log, from, to) {
  const useLog = log && values.every((value) => value > 0);
  const to01 = useLog ? Math.log10 : (value) => value;
  const from01 = useLog ? (power) => 10 ** power : (value) => value;
  const [bottom, top] = around(Math.min(...values.map(to01)), Math.max(...values.map(to01)), useLog ? 0 : 0.02);
  const place = (value) => from + ((to01(value) - bottom) / (top - bottom || 1)) * (to - from);
  const value = (at) => from01(bottom + ((at - from) / (to - from)) * (top - bottom || 1));
  if (useLog) {
    const all = [...Array(Math.floor(top) - Math.ceil(bottom) + 1).keys()].map((power) => 10 ** (Math.ceil(bottom) + power));
    const marks = all.length > 1 ? all : [...new Set(values)].sort((a, b) => a - b);
    return { place, value, ticks: marks.map((value) => [value, number(value)]) };
  }
  const step = niceStep((top - bottom) / 5);
  const marks = [...Array(Math.floor(top / step) - Math.ceil(bottom / step) + 1).keys()].map((at) => (Math.ceil(bottom / step) + at) * step);
  const texts = ticks(marks, true, number);
  return { place, value, ticks: marks.map((value, at) => [value, texts[at]]) };
}

/** 1, 2 or 5 times a power of ten, next above `step`. */
function niceStep(step) {
  const power = 10 ** Math.floor(Math.log10(step || 1));
  return power * [1, 2, 5, 10].find((times) => times * power >= step * 0.999);
}
