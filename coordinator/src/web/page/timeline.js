// What happened to a run, newest first. An event can be shown in the charts, and kinds can be filtered.

import { choice, h, keyed, panel, panelNote, setText } from './dom.js';
import { clock, cost, int, plural, words } from './format.js';

/** Entries that are shown before the reader asks for all. */
const SHOWN = 100;

const GROUPS = {
  worker_lost: 'faults', redone: 'faults', anomaly: 'faults', failed: 'faults',
  worker_joined: 'workers', worker_left: 'workers', waiting: 'workers', loading: 'workers', training: 'workers',
  checkpoint: 'checkpoints',
};
const TONES = {
  worker_lost: 'bad', failed: 'bad', anomaly: 'warn', redone: 'warn', paused: 'warn', stopped: 'warn', cancelled: 'warn',
  finished: 'good', worker_joined: 'good',
};
/** Events that stand in the charts; others would only crowd them. */
const MARKED = ['worker_lost', 'redone', 'anomaly', 'worker_joined', 'worker_left', 'paused', 'failed', 'note'];

/** An event's colour. @param {string} kind */
const toneOf = (kind) => TONES[kind] ?? 'plain';

/** The events that a chart marks, those of one step put together. @param {Object[]} timeline @param {(step: number) => number} toX */
export function markers(timeline, toX) {
  const steps = new Map();
  for (const entry of timeline) {
    if (entry.step === null || !MARKED.includes(entry.kind)) continue;
    const here = steps.get(entry.step) ?? [];
    here.push(entry);
    steps.set(entry.step, here);
  }
  const worst = (entries) => ['bad', 'warn', 'good'].find((tone) => entries.some((e) => toneOf(e.kind) === tone)) ?? 'plain';
  return [...steps].map(([step, entries]) => ({ x: toX(step), tone: worst(entries), text: entries.map((e) => e.text).join('; ') }));
}

/** The panel of events on a run's page. */
export class Timeline {
  #list = h('ol', { class: 'events' });
  #all = h('button', { type: 'button', class: 'small', hidden: true });
  #group = 'all';
  #open = false;
  #last = null;

  /** @param {(entry: Object) => void} onPick shows an entry's step in the charts */
  constructor(onPick) {
    this.onPick = onPick;
    const groups = [['all', 'all'], ['faults', 'faults'], ['workers', 'workers'], ['checkpoints', 'checkpoints'], ['other', 'other']];
    const filter = choice('events', 'Show', groups, 'all', (group) => {
      this.#group = group;
      this.#redo();
    });
    this.#all.addEventListener('click', () => {
      this.#open = true;
      this.#redo();
    });
    const scroll = h('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Events' }, this.#list, this.#all);
    this.element = panel('Events', { id: 'events' }, h('div', { class: 'tools' }, filter), scroll);
  }

  /** @param {Object[]} timeline @param {number} now */
  update(timeline, now) {
    this.#last = [timeline, now];
    const wanted = timeline.filter((e) => this.#group === 'all' || (GROUPS[e.kind] ?? 'other') === this.#group).reverse();
    const shown = this.#open ? wanted : wanted.slice(0, SHOWN);
    keyed(this.#list, shown, (entry) => entry.id, (entry) => this.#entry(entry, now));
    this.#all.hidden = shown.length === wanted.length;
    setText(this.#all, `Show all ${int(wanted.length)}`);
    const faults = timeline.filter((e) => GROUPS[e.kind] === 'faults');
    const late = faults.reduce((sum, e) => sum + (e.cost_ms ?? 0), 0);
    const parts = [plural(timeline.length, 'event')];
    if (faults.length > 0) parts.push(plural(faults.length, 'fault'), cost(late) && `${cost(late)} in all`);
    panelNote(this.element, parts.filter(Boolean).join(' · '));
  }

  #redo() {
    if (this.#last) this.update(...this.#last);
  }

  #entry(entry, now) {
    const inside = [
      h('time', { datetime: new Date(entry.time_ms).toISOString() }, clock(entry.time_ms, now)),
      h('span', { class: `kind ${toneOf(entry.kind)}` }, words(entry.kind)),
      h('span', { class: 'text' }, entry.text),
      h('span', { class: 'cost' }, cost(entry.cost_ms)),
    ];
    if (entry.step === null) return h('li', {}, h('div', { class: 'event' }, inside));
    return h('li', {}, h('button', { type: 'button', class: 'event', title: 'Show it in the charts', onclick: () => this.onPick(entry) }, inside));
  }
}
