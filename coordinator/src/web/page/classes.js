// How well a classifier tells its labels apart: accuracy, F1, and which label was taken for which, of the newest validation.

import { h, keyed, panel, panelNote, setText } from './dom.js';
import { fixed, int, percent } from './format.js';

/** Labels that the table shows, at most. */
const SHOWN = 24;

/** The panel of classes on a run's page; hidden where there are none. */
export class Classes {
  #head = h('tr');
  #body = h('tbody');

  constructor() {
    const whole = h('table', { class: 'confusion' }, h('caption', {}, 'Rows: the true label. Columns: what the model said.'), h('thead', {}, this.#head), this.#body);
    this.element = panel('Classes', { id: 'classes' }, h('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Classes' }, whole));
    this.element.hidden = true;
  }

  /** @param {Object[]} evals */
  update(evals) {
    const newest = evals.findLast((e) => e.classes);
    this.element.hidden = !newest;
    if (!newest) return;
    const { accuracy, macro_f1: f1, labels, confusion } = newest.classes;
    const shown = labels.slice(0, SHOWN);
    keyed(this.#head, ['', ...shown], (label) => label, (label) => h('th', { scope: 'col', class: 'number' }, label));
    const rows = shown.map((label, i) => ({ label, counts: confusion[i].slice(0, SHOWN), right: i, all: confusion[i].reduce((a, b) => a + b, 0) }));
    keyed(this.#body, rows, (row) => row.label, (row) => h('tr', {}, h('th', { scope: 'row' }, row.label), row.counts.map(() => h('td', { class: 'number' }))), (element, row) => {
      row.counts.forEach((count, i) => {
        const cell = element.children[i + 1];
        setText(cell, int(count));
        cell.className = count === 0 ? 'number muted' : i === row.right ? 'number right' : 'number wrong';
        cell.title = `${percent(row.all > 0 ? count / row.all : 0, 1)} of ${row.label}`;
      });
    });
    panelNote(this.element, `accuracy ${percent(accuracy, 1)}, macro F1 ${fixed(f1, 3)} at step ${int(newest.step)}`);
  }
}
