// A run's steps as the page has them: an overview of all steps, the same in more detail where the reader has zoomed in,
// and the steps that come while it trains, appended to both.

import { getHistory } from './api.js';
import { below, between } from './lookup.js';

/** Points that are asked for; about one for each pixel of a wide chart. */
const POINTS = 1000;
/** Points after which an overview that grew step by step is asked for anew. */
const MOST = 3 * POINTS;

/** The metrics of a step, each with the name of its value in a step's event. */
export const METRICS = ['loss', 'grad_norm', 'learning_rate', 'tokens_per_second', 'mfu'];

/** The history of one run. */
export class RunHistory {
  #all = empty();
  #detail = null;
  #waiting = new Set();

  /** @param {string} name */
  constructor(name) {
    this.name = name;
  }

  /** Asks for the overview. Steps that come meanwhile are kept and appended. */
  async load() {
    const waiting = [];
    this.#waiting.add(waiting);
    try {
      this.#all = filled(await getHistory(this.name, { points: POINTS }));
      append(this.#all, waiting);
    } finally {
      this.#waiting.delete(waiting);
    }
  }

  /**
   * Asks for more detail of some steps, if the overview has put several together there.
   * @param {number} from
   * @param {number} to
   */
  async zoom(from, to) {
    this.#detail = null;
    if (this.#all.loss.min.length === 0) return;
    // A little more on both sides, so that lines reach the edges.
    const more = Math.ceil((to - from) * 0.02) + 1;
    const detail = filled(await getHistory(this.name, { from: Math.max(0, from - more), to: to + more, points: POINTS }));
    detail.open = to + more >= this.lastStep;
    this.#detail = detail;
  }

  /** Forgets the detail. */
  whole() {
    this.#detail = null;
  }

  /** Takes up steps that were just committed. @param {Object[]} steps @returns {boolean} whether the overview should be asked for anew */
  append(steps) {
    this.#waiting.forEach((waiting) => waiting.push(...steps));
    append(this.#all, steps);
    if (this.#detail?.open) append(this.#detail, steps);
    return this.#all.step.length > MOST;
  }

  /** The newest step. */
  get lastStep() {
    return this.#all.step.at(-1) ?? 0;
  }

  /** Steps by points, for one metric and one axis: the detail where there is one, the overview elsewhere. */
  curve(metric, axis) {
    const whole = columns(this.#all, metric, axis, this.#all);
    if (!this.#detail || this.#detail.step.length === 0) return whole;
    const part = columns(this.#detail, metric, axis, this.#all);
    const before = below(whole.x, part.x[0]);
    const after = below(whole.x, part.x.at(-1)) + 1;
    const join = (name) => {
      if (!whole[name]) return null;
      return [...whole[name].slice(0, before), ...(part[name] ?? part.y), ...whole[name].slice(after)];
    };
    return { x: join('x'), y: join('y'), low: join('low'), high: join('high') };
  }

  /** Where a step lies on an axis. @param {number} step @param {'step'|'tokens'|'time'} axis */
  xOf(step, axis) {
    const { step: steps, [COLUMN[axis]]: values } = this.#all;
    if (axis === 'step' || steps.length === 0) return axis === 'step' ? step : 0;
    const x = between(steps, values, step);
    return axis === 'time' ? Math.max(0, (x - values[0]) / 1000) : Math.max(0, x);
  }

  /** The step at a place of an axis. @param {number} x @param {'step'|'tokens'|'time'} axis */
  stepAt(x, axis) {
    const { step: steps, [COLUMN[axis]]: values } = this.#all;
    if (axis === 'step' || steps.length === 0) return x;
    return between(values, steps, axis === 'time' ? values[0] + 1000 * x : x);
  }

  /**
   * The pace of the newest points: steps a second by the clock, whatever came between them, and the mean of the steps' own
   * tokens a second. Null before there are two.
   * @returns {{steps: number, tokens: number|null}|null}
   */
  pace() {
    const { step, time_ms: time, tokens_per_second: speed } = this.#all;
    const from = Math.max(0, step.length - 21);
    const seconds = (time.at(-1) - time[from]) / 1000;
    if (!(seconds > 0)) return null;
    const speeds = speed.mean.slice(from).filter(Number.isFinite);
    const tokens = speeds.length > 0 ? speeds.reduce((a, b) => a + b) / speeds.length : null;
    return { steps: (step.at(-1) - step[from]) / seconds, tokens };
  }
}

const COLUMN = { step: 'step', tokens: 'tokens', time: 'time_ms' };

function empty() {
  const history = { step: [], tokens: [], time_ms: [] };
  for (const metric of METRICS) history[metric] = { mean: [], min: [], max: [] };
  return history;
}

const filled = (history) => ({ ...empty(), ...history });

/** Steps that come again, as after a crash of the coordinator, replace what was there. */
function append(history, steps) {
  const bands = METRICS.map((metric) => [metric, history[metric]]);
  const wide = history.loss.min.length > 0;
  for (const event of steps) {
    while (history.step.length > 0 && history.step.at(-1) >= event.step) {
      for (const list of [history.step, history.tokens, history.time_ms]) list.pop();
      for (const [, band] of bands) for (const list of [band.mean, band.min, band.max]) list.pop();
    }
    history.step.push(event.step);
    history.tokens.push(event.tokens);
    history.time_ms.push(event.time_ms);
    for (const [metric, band] of bands) {
      const value = event[metric] ?? null;
      band.mean.push(value);
      if (wide) {
        band.min.push(value);
        band.max.push(value);
      }
    }
  }
}

function columns(history, metric, axis, all) {
  const band = history[metric];
  const wide = band.min.length === band.mean.length && band.min.length > 0;
  return {
    x: axis === 'time' ? history.time_ms.map((t) => (t - all.time_ms[0]) / 1000) : history[COLUMN[axis]],
    y: band.mean,
    low: wide ? band.min : null,
    high: wide ? band.max : null,
  };
}

/**
 * An exponential moving average without the pull of its start; gaps stay gaps.
 * @param {(number|null)[]} values
 * @param {number} weight of what came before, 0 to 1
 */
export function smoothed(values, weight) {
  let [sum, mass] = [0, 0];
  return values.map((value) => {
    if (value === null || !Number.isFinite(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}
