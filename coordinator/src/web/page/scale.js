// Where ticks stand and what they say. Pure arithmetic.

import { int, UNITS } from './format.js';

/**
 * Round numbers between two bounds, about so many.
 * @param {number} low
 * @param {number} high
 * @param {number} count
 * @returns {number[]}
 */
export function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.85);
  return multiples(low, high, step);
}

function multiples(low, high, step) {
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) ticks.push(n * step + 0);
  return ticks;
}

/**
 * Powers of ten between two bounds, with 2 and 5 between them if there are few; round numbers if there are none.
 * @param {number} low above 0
 * @param {number} high
 * @param {number} count
 * @returns {number[]}
 */
export function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const factors = decades > count ? [1] : decades > count / 3 ? [1, 3] : [1, 2, 5];
  const every = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    if (((e % every) + every) % every !== 0) continue;
    for (const f of factors) {
      const tick = f * 10 ** e;
      if (tick >= low * 0.9999 && tick <= high * 1.0001) ticks.push(tick);
    }
  }
  return ticks.length >= 3 ? ticks : linearTicks(low, high, count).filter((tick) => tick > 0);
}

const SPANS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

/**
 * Round time spans between two bounds, in seconds.
 * @param {number} low
 * @param {number} high
 * @param {number} count
 * @returns {number[]}
 */
export function timeTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (raw < 1) return linearTicks(low, high, count);
  const step = SPANS.find((s) => s >= raw) ?? 86400 * Math.ceil(raw / 86400);
  return multiples(low, high, step);
}

/** A time span as a clock would show it: `1:05`, `2:03:00`, `3 d 4 h`. @param {number} seconds */
export function timeLabel(seconds) {
  const s = Math.round(seconds);
  const two = (n) => String(n).padStart(2, '0');
  if (Math.abs(seconds) < 60) return `${Number(seconds.toFixed(1))} s`;
  if (s >= 2 * 86400) return `${Math.floor(s / 86400)} d ${Math.round((s % 86400) / 3600)} h`;
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return hours > 0 ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

/**
 * The labels of ticks: in one unit, with as many decimals as tell them apart.
 * @param {number[]} ticks
 * @returns {string[]}
 */
export function tickLabels(ticks) {
  const most = Math.max(...ticks.map(Math.abs));
  if (most < 1e-2 && most > 0) return ticks.map((t) => (t === 0 ? '0' : t.toExponential(1).replace('.0e', 'e')));
  const at = most < 1e4 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log10(most) / 3));
  const scaled = ticks.map((t) => t / 1000 ** at);
  let digits = 0;
  const told = (t) => Math.abs(t * 10 ** digits - Math.round(t * 10 ** digits)) < 1e-6;
  while (digits < 6 && !scaled.every(told)) digits += 1;
  return scaled.map((t) => (t === 0 ? '0' : t.toFixed(digits) + UNITS[at]));
}

/**
 * The x axes that a history can be drawn over: where ticks stand, what they say, and how one place is read out.
 */
export const AXES = {
  step: { name: 'step', ticks: linearTicks, labels: (ticks) => ticks.map(int), label: int },
  tokens: { name: 'tokens', ticks: linearTicks, labels: tickLabels, label: int },
  time: { name: 'time', ticks: timeTicks, labels: (ticks) => ticks.map(timeLabel), label: timeLabel },
};
