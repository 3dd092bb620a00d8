// The page of all runs: the cluster in short, the run that trains with its curve, and a table from which runs can be
// chosen to be compared.

import { getRuns } from './api.js';
import { Chart } from './chart.js';
import { ClusterTiles } from './cluster.js';
import { h, keyed, setAttr, setText, table } from './dom.js';
import { ago, clock, duration, fixed, human, int, percent } from './format.js';
import { badge, bar, setBadge, setBar } from './headline.js';
import { RunHistory } from './history.js';

/** Runs that can be compared at once. */
export const MOST_COMPARED = 8;

/** The page of runs. */
export class RunsPage {
  runs = [];
  #list = null;
  #chosen = new Set();
  #now = new Now();
  #tiles = new ClusterTiles();
  #search = h('input', { type: 'search', placeholder: 'Search runs', 'aria-label': 'Search runs' });
  #compare = h('button', { type: 'button', class: 'main', disabled: true });
  #none = h('p', { class: 'empty', hidden: true });
  #table = table('Runs', [
    ['Compare', 'pick'], ['Run', ''], ['Status', ''], ['Progress', ''], ['Loss', 'number'], ['Validation', 'number'],
    ['Tokens/s', 'number'], ['Parameters', 'number wide-only'], ['Submitted', ''],
  ], 'stack cards');

  /** @param {Object} app */
  constructor(app) {
    this.app = app;
    this.#search.addEventListener('input', () => this.#show());
    this.#compare.addEventListener('click', () => {
      app.go(`/compare?${new URLSearchParams([...this.#chosen].map((run) => ['run', run]))}`);
    });
    this.element = h(
      'article',
      {},
      h('h1', { tabindex: '-1' }, 'Runs'),
      this.#tiles.element,
      this.#now.element,
      h('div', { class: 'row tools' }, this.#search, this.#compare),
      this.#none,
      this.#table.element,
    );
    this.#count();
  }

  /** What the window is called. */
  title() {
    const active = this.#list?.find((run) => run.name === this.app.cluster?.active);
    return active ? `${percent(active.step / active.steps)} ${active.name}` : 'Runs';
  }

  /** Whether it needs nothing but the stream, which brings all runs itself: no run has a curve here. */
  rests() {
    return this.#list !== null && this.#now.name === null;
  }

  /** Asks for everything. */
  async open() {
    this.#list = await getRuns();
    this.#show();
    await this.#now.open();
  }

  /** Something came by the stream. @param {string} kind @param {*} data */
  event(kind, data) {
    if (kind === 'cluster') {
      this.#tiles.update(data);
      this.#follow(data.active);
    }
    if (kind === 'runs') this.#list = data;
    if (kind === 'steps') this.#now.steps(data);
    if (kind === 'reload') this.#now.open();
    if (kind === 'cluster' || kind === 'runs') this.#show();
  }

  /** Another run trains: its steps are wanted. */
  #follow(active) {
    if (this.#now.name === active) return;
    this.#now.choose(active);
    this.runs = active ? [active] : [];
    this.app.rewatch();
  }

  #show() {
    if (!this.#list) return;
    const wanted = this.#search.value.trim().toLowerCase();
    const shown = this.#list.filter((run) => `${run.name} ${run.status} ${run.kind} ${run.parent ?? ''}`.toLowerCase().includes(wanted));
    const now = this.app.now();
    keyed(this.#table.body, shown, (run) => run.name, (run) => this.#row(run), (element, run) => showRow(element, run, now));
    this.#table.element.hidden = shown.length === 0;
    this.#none.hidden = shown.length > 0;
    setText(this.#none, this.#list.length === 0 ? 'No run yet. `cohort pretrain --preset tiny --corpus PATH --coordinator URL` submits one.' : 'No run fits.');
    this.#now.update(this.#list.find((run) => run.name === this.#now.name));
    this.app.retitle();
  }

  #row(run) {
    const pick = h('input', { type: 'checkbox', 'aria-label': `Compare ${run.name}`, onchange: (e) => {
      if (e.target.checked) this.#chosen.add(run.name);
      else this.#chosen.delete(run.name);
      this.#count();
    } });
    const cell = (title, kind = 'number') => h('td', { class: kind, 'data-title': title });
    return h(
      'tr',
      {},
      h('td', { class: 'pick' }, pick),
      h('th', { scope: 'row' }, h('a', { href: `/runs/${encodeURIComponent(run.name)}` }, run.name), h('small')),
      h('td', { class: 'state' }, badge(run.status)),
      h('td', { class: 'progress' }, bar(`Progress of ${run.name}`), h('small')),
      cell('Loss'), cell('Validation'), cell('Tokens/s'), cell('Parameters', 'number wide-only'), cell('Submitted', 'when'),
    );
  }

  #count() {
    const count = this.#chosen.size;
    this.#compare.disabled = count < 2 || count > MOST_COMPARED;
    const words = count < 2 ? 'Choose runs to compare' : count > MOST_COMPARED ? `At most ${MOST_COMPARED} can be compared` : `Compare ${count} runs`;
    setText(this.#compare, words);
  }

  /** Reads the page's colours again. */
  recolor() {
    this.#now.recolor();
  }

  /** The page is left. */
  dispose() {}
}

function showRow(element, run, now) {
  const [, name, status, progress, loss, val, speed, parameters, when] = element.children;
  setText(name.lastElementChild, run.parent ? `${run.kind} of ${run.parent}` : run.kind);
  setBadge(status.firstElementChild, run.status);
  setBar(progress.firstElementChild, run.steps > 0 ? run.step / run.steps : 1, run.status);
  const place = run.status === 'queued' && run.queue_place ? `place ${run.queue_place} in the queue` : `${int(run.step)} of ${int(run.steps)}`;
  setText(progress.lastElementChild, run.error ?? place);
  setText(loss, fixed(run.loss));
  setText(val, fixed(run.val_loss));
  setText(speed, human(run.tokens_per_second));
  setText(parameters, human(run.parameters));
  setText(when, ago(run.created_ms, now));
  const took = run.finished_ms ? `, ended ${duration((run.finished_ms - run.created_ms) / 1000)} later` : '';
  setAttr(when, 'title', clock(run.created_ms, now) + took);
}

/** The run that trains, with its curve. */
class Now {
  name = null;
  #history = null;
  #chart = new Chart({ title: 'Loss', format: (y) => fixed(y), small: true });
  #link = h('a', {});
  #words = h('span', { class: 'muted' });
  #bar = bar('Progress of the run that trains');

  constructor() {
    this.element = h(
      'section',
      { class: 'card', hidden: true, 'aria-label': 'The run that trains' },
      h('div', { class: 'row' }, h('h2', {}, this.#link), this.#words),
      this.#bar,
      this.#chart.element,
    );
  }

  /** @param {string|null} name */
  choose(name) {
    this.name = name;
    this.#history = name ? new RunHistory(name) : null;
    this.element.hidden = !name;
    if (!name) return;
    setText(this.#link, name);
    setAttr(this.#link, 'href', `/runs/${encodeURIComponent(name)}`);
    this.#draw();
  }

  /** Asks for the curve. */
  async open() {
    await this.#history?.load();
    this.#draw();
  }

  /** @param {Object[]} steps */
  steps(steps) {
    const own = steps.filter((step) => step.run === this.name);
    if (own.length === 0) return;
    if (this.#history.append(own)) this.open().catch(() => {});
    this.#draw();
  }

  /** @param {Object|undefined} run */
  update(run) {
    if (!run) return;
    setBar(this.#bar, run.steps > 0 ? run.step / run.steps : 1, run.status);
    const pace = this.#history?.pace();
    const left = pace ? `${duration((run.steps - run.step) / pace.steps)} left` : '';
    setText(this.#words, [`step ${int(run.step)} of ${int(run.steps)}`, `loss ${fixed(run.loss)}`, `${human(run.tokens_per_second)} tokens/s`, left].filter(Boolean).join(' · '));
  }

  #draw() {
    if (this.#history) this.#chart.show({ series: [{ ...this.#history.curve('loss', 'step'), name: 'training', tone: 0 }] });
  }

  /** Reads the page's colours again. */
  recolor() {
    this.#chart.recolor();
  }
}
