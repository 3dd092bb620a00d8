// The top of a run's page: its state, how far it is, and its figures of this moment.

import { h, setText, setAttr } from './dom.js';
import { duration, fixed, human, int, percent, power, plural } from './format.js';

/** A run's status as a badge. @param {string} status */
export function badge(status) {
  const element = h('span', { class: 'badge' });
  setBadge(element, status);
  return element;
}

/** Changes a badge. @param {Element} element @param {string} status */
export function setBadge(element, status) {
  setText(element, status);
  setAttr(element, 'data-status', status);
}

/** A bar that shows a share. @param {string} label */
export function bar(label) {
  return h('div', { class: 'bar', role: 'progressbar', 'aria-label': label, 'aria-valuemin': '0', 'aria-valuemax': '100' }, h('span'));
}

/** Sets a bar. @param {Element} element @param {number} share @param {string} status */
export function setBar(element, share, status) {
  const percentage = Math.max(0, Math.min(100, 100 * share || 0));
  element.firstElementChild.style.setProperty('--share', `${percentage}%`);
  setAttr(element, 'aria-valuenow', percentage.toFixed(1));
  setAttr(element, 'data-status', status);
}

const TILES = [
  ['loss', 'Loss', 'mean of the step, nats per token'],
  ['bits', 'Bits per byte', 'the loss per byte of text'],
  ['val', 'Validation', 'the newest, nats per token'],
  ['best', 'Best validation', 'the lowest so far'],
  ['norm', 'Gradient norm', 'before clipping'],
  ['rate', 'Learning rate', 'of the newest update'],
  ['speed', 'Tokens per second', 'over the newest steps'],
  ['mfu', 'MFU', 'the part of what the processors can do that went into the model'],
  ['tokens', 'Tokens', 'of the whole run'],
  ['epoch', 'Epoch', 'passes over the training split, and the place in this one'],
];

/** The headline of a run's page. */
export class Headline {
  #badge = badge('');
  #bar = bar('Progress');
  #place = h('p', { class: 'place' });
  #error = h('p', { class: 'error', hidden: true });
  #tiles = new Map(
    TILES.map(([key, name, title]) => [key, { value: h('dd'), note: h('small'), name, title }]),
  );

  /** @param {string} name */
  constructor(name) {
    this.name = name;
    this.kind = h('span', { class: 'muted' });
    this.actions = h('div', { class: 'actions' });
    const tiles = [...this.#tiles.values()].map(({ value, note, name: term, title }) =>
      h('div', { class: 'tile', title }, h('dt', {}, term), value, note),
    );
    this.element = h(
      'div',
      { class: 'headline' },
      h('div', { class: 'row' }, h('h1', { tabindex: '-1' }, name), this.#badge, this.kind, this.actions),
      this.#error,
      this.#bar,
      this.#place,
      h('dl', { class: 'tiles' }, tiles),
    );
  }

  /**
   * Shows a run as it is now.
   * @param {{info: Object, facts: Object}} view
   * @param {Object|null} step the newest step
   * @param {{eta: number|null, speed: number|null}} pace seconds to the end, tokens a second
   */
  update({ info, facts }, step, { eta, speed }) {
    const { steps } = info.spec.train;
    const done = info.step;
    setBadge(this.#badge, info.status);
    setText(this.kind, describe(info, facts));
    setBar(this.#bar, steps > 0 ? done / steps : 1, info.status);
    setText(this.#place, this.#words(info, done, steps, eta));
    this.#error.hidden = !info.error;
    setText(this.#error, info.error ?? '');
    const evals = info.evals.filter((e) => e.split === 'validation');
    const newest = evals.at(-1);
    const best = evals.reduce((low, e) => (low && low.loss <= e.loss ? low : e), null);
    this.#tile('loss', fixed(step?.loss));
    this.#tile('bits', fixed(step?.bits_per_byte));
    this.#tile('val', fixed(newest?.loss), newest ? `${bits(newest)}step ${int(newest.step)}` : '');
    this.#tile('best', fixed(best?.loss), best ? `${bits(best)}step ${int(best.step)}` : '');
    this.#tile('norm', fixed(step?.grad_norm, 3));
    this.#tile('rate', power(step?.learning_rate));
    this.#tile('speed', human(speed ?? step?.tokens_per_second));
    this.#tile('mfu', percent(step?.mfu, 1));
    this.#tile('tokens', human(step?.tokens), facts.train_tokens ? `of ${human(facts.train_tokens)} an epoch` : '');
    this.#tile('epoch', step ? fixed(step.epoch, 2) : '–', position(step, facts));
  }

  #tile(key, value, note = '') {
    const tile = this.#tiles.get(key);
    setText(tile.value, value);
    setText(tile.note, note);
  }

  #words(info, done, steps, eta) {
    const parts = [`step ${int(done)} of ${int(steps)}`, percent(steps > 0 ? done / steps : 1, 1)];
    if (info.status === 'queued' && info.queue_place) parts.push(`place ${info.queue_place} in the queue`);
    if (info.status === 'running' && eta !== null) parts.push(`${duration(eta)} left`);
    if (info.finished_ms) parts.push(`took ${duration((info.finished_ms - info.created_ms) / 1000)} from submission to end`);
    return parts.join(' · ');
  }
}

const bits = (e) => (e.bits_per_byte ? `${fixed(e.bits_per_byte, 3)} bits per byte, ` : '');

function position(step, facts) {
  if (!step || !facts.epoch_samples) return '';
  const part = step.epoch % 1;
  return `${percent(part)} of ${plural(facts.epoch_samples, 'sample')}`;
}

function describe(info, facts) {
  const { model } = info.spec;
  const trained = facts.trained && facts.trained !== facts.parameters ? `, ${human(facts.trained)} trained` : '';
  const from = info.parent ? ` from ${info.parent}` : '';
  const corpus = facts.corpus ? ` on ${facts.corpus}` : '';
  return `${info.spec.kind} of a ${model.architecture} with ${human(facts.parameters)} parameters${trained}${corpus}${from}`;
}
