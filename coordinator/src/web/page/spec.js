// A run's spec as a table that can be searched, with what was derived, inherited or set by default.

import { h, keyed, panel, panelNote, table } from './dom.js';
import { bytes, human, int, plural } from './format.js';

/**
 * Nested values as rows: dotted key and text.
 * @param {*} value
 * @param {string} [key]
 * @returns {[string, string][]}
 */
export function flat(value, key = '') {
  const plain = value === null || typeof value !== 'object';
  if (plain || (Array.isArray(value) && value.every((v) => typeof v !== 'object'))) {
    return [[key, value === null ? 'none' : Array.isArray(value) ? JSON.stringify(value) : String(value)]];
  }
  return Object.entries(value).flatMap(([name, inner]) => flat(inner, key ? `${key}.${name}` : name));
}

/** What is known of a run beside its spec. @param {Object} facts @returns {[string, string][]} */
export function factRows(facts) {
  const rows = [
    ['corpus name', facts.corpus || 'not known'],
    ['parameters', int(facts.parameters)],
    ['parameters that are trained', int(facts.trained)],
    ['FLOPs of a step for one token', human(facts.flops_per_token)],
    ['tokens of the training split', int(facts.train_tokens)],
    ['samples of one epoch', int(facts.epoch_samples)],
  ];
  if (facts.bytes_per_token) rows.push(['bytes of text in a token', bytes(facts.bytes_per_token)]);
  const { uniform, unigram, ngram } = facts.baselines ?? {};
  if (Number.isFinite(uniform)) rows.push(['loss of guessing at random', `${uniform.toFixed(4)} (ln of the vocabulary)`]);
  if (Number.isFinite(unigram)) rows.push(['loss of the unigram model', unigram.toFixed(4)]);
  if (ngram) rows.push([`loss of the ${ngram.order}-gram model`, `${ngram.loss.toFixed(4)}, counted on ${int(ngram.counted)} of ${int(ngram.of)} tokens`]);
  return rows;
}

/** The panel of the spec on a run's page. */
export class Spec {
  #table = table('Spec', [['Key', ''], ['Value', ''], ['Where it comes from', '']], 'stack');
  #notes = h('ul', { class: 'notes' });
  #search = h('input', { type: 'search', placeholder: 'Search keys and values', 'aria-label': 'Search the spec' });
  #rows = [];

  constructor() {
    this.#search.addEventListener('input', () => this.#show());
    this.element = panel('Spec', { id: 'spec', open: false }, this.#search, this.#table.element, this.#notes);
  }

  /** @param {Object} spec @param {Object} facts */
  update(spec, facts) {
    const notes = new Set(facts.notes);
    const noteOf = (key) => {
      // Whole keys only: `train.steps` is not meant by a note on `train.steps_more`.
      const own = [...notes].find((note) => new RegExp(`(^|[^\\w.])${key.replaceAll('.', '\\.')}($|[^\\w.])`).test(note));
      if (own) notes.delete(own);
      return own ?? '';
    };
    const keys = flat(spec).map(([key, value]) => ({ key, value, note: noteOf(key) }));
    const more = factRows(facts).map(([key, value]) => ({ key, value, note: '' }));
    this.#rows = [...keys, ...more];
    keyed(this.#notes, [...notes], (note) => note, (note) => h('li', {}, note));
    this.#show();
  }

  #show() {
    const wanted = this.#search.value.trim().toLowerCase();
    const rows = this.#rows.filter(({ key, value, note }) => `${key} ${value} ${note}`.toLowerCase().includes(wanted));
    keyed(this.#table.body, rows, ({ key, value, note }) => `${key}\n${value}\n${note}`, ({ key, value, note }) =>
      h('tr', {}, h('th', { scope: 'row', class: 'mono' }, key), h('td', { class: 'mono', 'data-title': 'Value' }, value), h('td', { 'data-title': 'From' }, note)),
    );
    panelNote(this.element, wanted ? `${int(rows.length)} of ${plural(this.#rows.length, 'value')}` : plural(this.#rows.length, 'value'));
  }
}
