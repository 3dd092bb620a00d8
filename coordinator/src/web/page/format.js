// Numbers, times and sizes as people read them. Pure: the same value gives the same text.

/** What stands where a value is not known. */
export const NONE = '–';

/** What stands behind thousands, millions and so on. */
export const UNITS = ['', 'k', 'M', 'G', 'T', 'P', 'E'];

const known = (x) => typeof x === 'number' && Number.isFinite(x);

/** A whole number with separators. @param {number} n */
export const int = (n) => (known(n) ? Math.round(n).toLocaleString('en-US') : NONE);

/** A number in three digits and a unit: `33.3k`. @param {number} n */
export function human(n) {
  if (!known(n)) return NONE;
  let at = 0;
  let size = Math.abs(n);
  while (size >= 999.5 && at < UNITS.length - 1) {
    size /= 1000;
    at += 1;
  }
  const digits = at === 0 && Number.isInteger(n) ? 0 : size < 9.995 ? 2 : size < 99.95 ? 1 : 0;
  return `${n < 0 ? '−' : ''}${size.toFixed(digits)}${UNITS[at]}`;
}

/** Bytes in units of 1000, as `cohort` prints them. @param {number} n */
export const bytes = (n) => (known(n) ? `${human(Math.round(n)).replace(/([kMGTPE]?)$/, ' $1')}B` : NONE);

/** A loss or another figure with four decimals. @param {number} x */
export const fixed = (x, digits = 4) => (known(x) ? x.toFixed(digits) : NONE);

/** A small number by its powers of ten: `3.00e-4`. @param {number} x */
export const power = (x) => (known(x) ? (x === 0 ? '0' : x.toExponential(2)) : NONE);

/** A share as percent. @param {number} x */
export const percent = (x, digits = 0) => (known(x) ? `${(100 * x).toFixed(digits)} %` : NONE);

/** Whatever number a chart has, short. @param {number} x */
export function short(x) {
  if (!known(x)) return NONE;
  const size = Math.abs(x);
  if (size === 0) return '0';
  if (size < 1e-3) return x.toExponential(2);
  if (size < 1000) return Number(x.toPrecision(5)).toString();
  return human(x);
}

/** A time span. @param {number} seconds */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  const two = (n) => String(n).padStart(2, '0');
  const s = Math.max(0, seconds);
  if (s < 9.95) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${two(whole % 60)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${two(minutes % 60)} min`;
  return `${Math.floor(hours / 24)} d ${two(hours % 24)} h`;
}

/** How much later something came because of an event; nothing if that cannot be felt. @param {number} ms */
export const cost = (ms) => (known(ms) && ms >= 5 ? `+${(ms / 1000).toFixed(2)} s` : '');

/** How long ago, roughly. @param {number} ms @param {number} now */
export function ago(ms, now) {
  if (!known(ms)) return NONE;
  const seconds = Math.max(0, (now - ms) / 1000);
  if (seconds < 60) return 'just now';
  const [size, unit] = seconds < 3600 ? [60, 'min'] : seconds < 86400 ? [3600, 'h'] : [86400, 'd'];
  return `${Math.floor(seconds / size)} ${unit} ago`;
}

/** A moment by the reader's clock; with its date unless it is today. @param {number} ms @param {number} now */
export function clock(ms, now) {
  if (!known(ms)) return NONE;
  const at = new Date(ms);
  const time = at.toLocaleTimeString('en-GB');
  if (at.toDateString() === new Date(now).toDateString()) return time;
  return `${at.toLocaleDateString('en-CA')} ${time}`;
}

/** One or many of something. @param {number} n @param {string} one @param {string} [many] */
export const plural = (n, one, many = `${one}s`) => `${int(n)} ${n === 1 ? one : many}`;

/** The words of an event's kind. @param {string} kind */
export const words = (kind) => kind.replaceAll('_', ' ');

/** Words that the program knows, for people. @param {string} split */
export const splitName = (split) => (split === 'base_validation' ? "base's validation" : words(split));
