// Several runs side by side: their curves over each other, what differs in their specs, and how they ended.

import { getRun } from './api.js';
import { Charts, validations } from './charts.js';
import { h, keyed, panel, panelNote, setText, table, toast } from './dom.js';
import { duration, fixed, human, int, percent, plural, splitName } from './format.js';
import { setBadge, badge } from './headline.js';
import { RunHistory } from './history.js';
import { MOST_COMPARED } from './runs.js';
import { factRows, flat } from './spec.js';

/** The page of a comparison. */
export class ComparePage {
  #runs = new Map();
  #chips = h('ul', { class: 'chips' });
  #add = h('select', { 'aria-label': 'Add a run' });
  #none = h('p', { class: 'empty' }, 'Choose two runs or more.');
  #figures = table('Figures', []);
  #spec = table('Specs', []);
  #all = h('input', { type: 'checkbox' });
  #zooming = 0;
  #drawing = 0;

  /** @param {Object} app @param {string[]} names */
  constructor(app, names) {
    this.app = app;
    this.runs = names.slice(0, MOST_COMPARED);
    this.runs.forEach((name, tone) => this.#runs.set(name, { tone, view: null, history: new RunHistory(name) }));
    const first = () => this.#runs.values().next().value?.history;
    this.charts = new Charts({
      id: 'compare',
      fill: (kind, charts) => this.#fill(kind, charts),
      onZoom: (view) => this.#zoomed(view),
      toStep: (x) => first()?.stepAt(x, this.charts.axis) ?? x,
      toX: (step) => first()?.xOf(step, this.charts.axis) ?? step,
    });
    this.#all.addEventListener('change', () => this.#showSpec());
    this.#add.addEventListener('change', () => this.#go([...this.runs, this.#add.value]));
    this.figures = panel('Figures', { id: 'figures' }, this.#figures.element);
    this.spec = panel('What differs', { id: 'differences' }, h('label', { class: 'check' }, this.#all, ' Show what is the same as well'), this.#spec.element);
    this.element = h(
      'article',
      {},
      h('h1', { tabindex: '-1' }, 'Compare'),
      h('div', { class: 'row' }, this.#chips, this.#add),
      this.#none, this.charts.element, this.figures, this.spec,
    );
    for (const part of [this.charts.element, this.figures, this.spec]) part.hidden = this.runs.length === 0;
    this.#none.hidden = this.runs.length > 1;
    this.#choices();
  }

  /** What the window is called. */
  title() {
    return this.runs.length > 0 ? this.runs.join(' and ') : 'Compare';
  }

  #go(names) {
    this.app.go(`/compare?${new URLSearchParams(names.map((run) => ['run', run]))}`);
  }

  /** The runs that can be added, and those that are there. */
  #choices() {
    const others = (this.app.runs ?? []).map((run) => run.name).filter((name) => !this.runs.includes(name));
    const items = ['', ...others];
    keyed(this.#add, items, (name) => name, (name) => h('option', { value: name }, name || 'Add a run…'));
    this.#add.disabled = this.runs.length >= MOST_COMPARED;
    keyed(this.#chips, this.runs, (name) => name, (name) => {
      const remove = h('button', { type: 'button', class: 'quiet', 'aria-label': `Remove ${name}`, onclick: () => this.#go(this.runs.filter((n) => n !== name)) }, '×');
      return h('li', { class: `tone-${this.#runs.get(name).tone}` }, h('a', { href: `/runs/${encodeURIComponent(name)}` }, name), remove);
    });
  }

  /** Whether it is shown as it is and will stay. */
  rests() {
    const still = ({ view }) => view !== null && !['queued', 'running'].includes(view.info.status);
    return [...this.#runs.values()].every(still);
  }

  /** Asks for everything. */
  async open() {
    const asked = [...this.#runs].map(async ([name, run]) => {
      try {
        [run.view] = await Promise.all([getRun(name), run.history.load()]);
      } catch (error) {
        toast(`${name}: ${error.message}`, 'bad');
      }
    });
    await Promise.all(asked);
    this.#showFigures();
    this.#showSpec();
    this.#draw();
  }

  /** Something came by the stream. @param {string} kind @param {*} data */
  event(kind, data) {
    if (kind === 'runs') {
      this.#choices();
      for (const run of data) {
        const info = this.#runs.get(run.name)?.view?.info;
        if (info) Object.assign(info, { status: run.status, step: run.step });
      }
      this.#showFigures();
    }
    if (kind === 'reload') this.open().catch(() => {});
    if (kind === 'steps') this.#steps(data);
    if (kind === 'eval') {
      this.#runs.get(data.run)?.view?.info.evals.push(data);
      this.#showFigures();
      this.#draw();
    }
  }

  #steps(steps) {
    for (const [name, run] of this.#runs) {
      const own = steps.filter((step) => step.run === name);
      if (own.length === 0) continue;
      if (run.view) run.view.info.last_step = own.at(-1);
      if (run.history.append(own)) run.history.load().then(() => this.#draw(), () => {});
    }
    this.#showFigures();
    this.#draw();
  }

  #loaded() {
    return [...this.#runs].filter(([, run]) => run.view);
  }

  #showFigures() {
    const runs = this.#loaded();
    this.#head(this.#figures, 'Figure', runs);
    const figures = [
      ['Status', ({ info }) => info.status],
      ['Steps', ({ info }) => `${int(info.step)} of ${int(info.spec.train.steps)}`],
      ['Loss', ({ info }) => fixed(info.last_step?.loss)],
      ['Validation, newest', ({ info }) => fixed(of(info, 'validation').at(-1)?.loss)],
      ['Validation, best', ({ info }) => best(info, 'loss')],
      ['Bits per byte, best', ({ info }) => best(info, 'bits_per_byte')],
      ["Base's validation, newest", ({ info }) => fixed(of(info, 'base_validation').at(-1)?.loss)],
      ['Accuracy, newest', ({ info }) => percent(info.evals.findLast((e) => e.classes)?.classes.accuracy, 1)],
      ['Tokens', ({ info }) => human(info.last_step?.tokens)],
      ['Tokens per second', ({ info }) => human(info.last_step?.tokens_per_second)],
      ['MFU', ({ info }) => percent(info.last_step?.mfu, 1)],
      ['Epoch', ({ info }) => fixed(info.last_step?.epoch, 2)],
      ['From submission to end', ({ info }) => duration(info.finished_ms ? (info.finished_ms - info.created_ms) / 1000 : NaN)],
      ['Parameters', ({ facts }) => human(facts.parameters)],
      ['Workers lost', ({ timeline }) => int(timeline.filter((e) => e.kind === 'worker_lost').length)],
    ];
    const rows = figures.map(([name, read]) => ({ name, values: runs.map(([, run]) => read(run.view)) }));
    const known = rows.filter(({ values }) => values.some((value) => value !== '–'));
    this.#rows(this.#figures, known, runs);
    panelNote(this.figures, '');
  }

  #showSpec() {
    const runs = this.#loaded();
    this.#head(this.#spec, 'Key', runs);
    const flats = runs.map(([, run]) => new Map([...flat(run.view.info.spec), ...factRows(run.view.facts)]));
    const keys = [...new Set(flats.flatMap((each) => [...each.keys()]))];
    const rows = keys.map((name) => ({ name, values: flats.map((each) => each.get(name) ?? '–') }));
    const differ = rows.filter(({ values }) => new Set(values).size > 1);
    this.#rows(this.#spec, this.#all.checked ? rows : differ, runs);
    panelNote(this.spec, `${int(differ.length)} of ${plural(rows.length, 'value')}`);
  }

  #head({ head }, first, runs) {
    const columns = [first, ...runs.map(([name]) => name)];
    keyed(head, columns, (name) => name, (name) => h('th', { scope: 'col' }, name));
  }

  #rows({ body }, rows, runs) {
    const width = runs.map(([name]) => name).join('\n');
    keyed(body, rows, ({ name }) => `${name}\n${width}`, ({ name, values }) =>
      h('tr', {}, h('th', { scope: 'row' }, name), values.map((_, i) => h('td', { 'data-title': runs[i][0] }, name === 'Status' ? badge('') : null))),
    (element, { name, values }) => {
      element.classList.toggle('differs', new Set(values).size > 1);
      values.forEach((value, i) => {
        const cell = element.children[i + 1];
        if (name === 'Status') setBadge(cell.firstElementChild, value);
        else setText(cell, value);
      });
    });
  }

  #zoomed(view) {
    clearTimeout(this.#zooming);
    this.#zooming = setTimeout(async () => {
      const asked = this.#loaded().map(async ([, { history }]) => {
        if (view === null) return history.whole();
        const [from, to] = view.map((x) => history.stepAt(x, this.charts.axis));
        if (from <= history.lastStep) await history.zoom(Math.floor(from), Math.ceil(to));
      });
      await Promise.allSettled(asked);
      this.#draw();
    }, view === null ? 0 : 150);
  }

  #draw() {
    this.#drawing ||= requestAnimationFrame(() => {
      this.#drawing = 0;
      this.charts.update();
    });
  }

  #fill({ metric }, charts) {
    const series = this.#loaded().flatMap(([name, { tone, view, history }]) => {
      const curve = charts.smooth(history.curve(metric, charts.axis), name, tone);
      if (metric !== 'loss') return [curve];
      const toX = (step) => history.xOf(step, charts.axis);
      return [curve, ...validations(view.info.evals, toX, (split) => ({ name: `${name}, ${splitName(split)}`, tone }))];
    });
    return { series };
  }

  /** Reads the page's colours again. */
  recolor() {
    this.charts.recolor();
  }

  /** The page is left. */
  dispose() {
    clearTimeout(this.#zooming);
  }
}

const of = (info, split) => info.evals.filter((e) => e.split === split);

function best(info, figure) {
  const found = of(info, 'validation').filter((e) => e[figure] !== null && e[figure] !== undefined);
  if (found.length === 0) return '–';
  const low = found.reduce((a, b) => (b[figure] < a[figure] ? b : a));
  return `${fixed(low[figure])} at step ${int(low.step)}`;
}
