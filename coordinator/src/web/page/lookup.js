// Places in ascending lists, by halving.

/**
 * How many of ascending values lie below `x`.
 * @param {ArrayLike<number>} values
 * @param {number} x
 * @returns {number}
 */
export function below(values, x) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The range of places whose values lie between two bounds, both included; its end is not part of it. */
export function within(values, a, b) {
  let to = below(values, b);
  while (to < values.length && values[to] <= b) to += 1;
  return [below(values, a), to];
}

/** The same with a place more on each side, so that lines reach the edges. */
export function around(values, a, b) {
  const [from, to] = within(values, a, b);
  return [Math.max(0, from - 1), Math.min(values.length, to + 1)];
}

/** The place whose value is nearest to `x`; -1 if there is none. */
export function nearest(values, x) {
  const at = below(values, x);
  if (at === 0) return values.length > 0 ? 0 : -1;
  if (at === values.length) return at - 1;
  return x - values[at - 1] <= values[at] - x ? at - 1 : at;
}

/** The last place whose value is not above `x`; -1 if there is none. */
export function lastAt(values, x) {
  const at = below(values, x);
  return at < values.length && values[at] === x ? at : at - 1;
}

/**
 * The value beside `key`, on the line between its neighbours; beyond the ends, on the line of the first or last two.
 * @param {ArrayLike<number>} keys ascending
 * @param {ArrayLike<number>} values
 * @param {number} key
 * @returns {number}
 */
export function between(keys, values, key) {
  if (keys.length < 2) return values[0] ?? 0;
  const at = Math.max(1, Math.min(below(keys, key), keys.length - 1));
  const span = keys[at] - keys[at - 1];
  const part = span > 0 ? (key - keys[at - 1]) / span : 1;
  return values[at - 1] + part * (values[at] - values[at - 1]);
}

/** The ranges of places, between two, where values are known numbers. */
export function* stretches(values, from, to) {
  let start = -1;
  for (let i = from; i < to; i += 1) {
    if (Number.isFinite(values[i])) {
      if (start < 0) start = i;
    } else if (start >= 0) {
      yield [start, i];
      start = -1;
    }
  }
  if (start >= 0) yield [start, to];
}
