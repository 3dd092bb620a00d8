// The workers' table: what each computes with, how fast, and where its time goes. Those that a run has lost stay in it, as
// lost, with what their loss cost.

import { h, keyed, panel, panelNote, setAttr, setText, table } from './dom.js';
import { ago, bytes, clock, cost, fixed, human, int, percent, plural } from './format.js';

/** Where a worker's time goes, with the meaning of each part. */
const TIMES = [
  ['compute', 'lanes, updates, validations'],
  ['exchange', 'sends or receives sums, computes nothing'],
  ['wait', 'nothing to do while others compute'],
  ['data', 'waits for text'],
];

/** Lost workers that are shown, at most. */
const LOST = 16;

/** The panel of workers on a run's page. */
export class Workers {
  #table = table('Workers', [
    ['Worker', ''], ['Device', ''], ['Lanes', 'number'], ['Tokens/s', 'number'], ['Where its time goes', 'times'],
    ['MFU', 'number'], ['Cores', 'number wide-only'], ['Memory', 'number wide-only'], ['Sent, received', 'number wide-only'],
  ], 'stack');
  #none = h('p', { class: 'muted' });

  constructor() {
    const legend = h('ul', { class: 'legend' }, TIMES.map(([name, title]) => h('li', { class: `time-${name}` }, `${name}: ${title}`)));
    this.element = panel('Workers', { id: 'workers' }, this.#none, legend, this.#table.element);
    this.legend = legend;
  }

  /**
   * Shows the workers of a run.
   * @param {Object|null} cluster
   * @param {{info: Object, timeline: Object[]}} view
   * @param {number} now
   */
  update(cluster, view, now) {
    const active = cluster?.active === view.info.name;
    const gone = lost(view.timeline, cluster?.workers ?? [], view.info.step);
    // A loss is told at once, the cluster is described once a second.
    const dead = new Set(gone.map((entry) => entry.worker));
    const here = active ? cluster.workers.filter((worker) => !dead.has(worker.name)) : [];
    const rows = [...gone.map((entry) => ({ key: `lost ${entry.id}`, lost: entry })), ...here.map((worker) => ({ key: worker.name, worker }))];
    keyed(this.#table.body, rows, (row) => row.key, create, (element, row) =>
      row.worker ? showWorker(element, row.worker) : showLost(element, row.lost, now),
    );
    this.#table.element.hidden = rows.length === 0;
    this.legend.hidden = here.length === 0;
    const members = cluster ? plural(cluster.workers.length, 'worker') : 'no workers';
    this.#none.hidden = active && here.length > 0;
    setText(this.#none, active ? 'No worker is there. The run waits for some.' : `The run does not train now. The cluster has ${members}.`);
    const speed = here.reduce((sum, worker) => sum + (worker.tokens_per_second ?? 0), 0);
    const parts = active ? [plural(here.length, 'worker'), speed > 0 ? `${human(speed)} tokens/s` : ''] : [];
    const late = here.filter((worker) => worker.straggler).map((worker) => worker.name);
    if (late.length > 0) parts.push(`straggler: ${late.join(', ')}`);
    if (gone.length > 0) parts.push(`${int(gone.length)} lost`);
    panelNote(this.element, parts.filter(Boolean).join(' · '));
  }
}

/**
 * Losses of workers that are not there again, newest first, each with the cost of what had to be done again: nothing, once
 * the step is committed and no lane of it was.
 */
function lost(timeline, workers, committed) {
  const joined = new Map(workers.map((worker) => [worker.name, worker.joined_ms]));
  const losses = timeline.filter((entry) => entry.kind === 'worker_lost' && !(joined.get(entry.worker) > entry.time_ms));
  const newest = new Map(losses.map((entry) => [entry.worker, entry]));
  const costs = new Map();
  for (const entry of timeline) {
    const loss = entry.kind === 'redone' && newest.get(entry.worker);
    if (loss && entry.id > loss.id && entry.cost_ms !== null) costs.set(entry.worker, Math.max(costs.get(entry.worker) ?? 0, entry.cost_ms));
  }
  const all = [...newest.values()].map((entry) => ({ ...entry, cost: costs.get(entry.worker) ?? (entry.step <= committed ? 0 : null) }));
  return all.sort((a, b) => b.id - a.id).slice(0, LOST);
}

function create(row) {
  if (row.lost) {
    return h('tr', { class: 'lost', 'data-lost': row.lost.worker }, h('th', { scope: 'row' }), h('td', { colspan: '3' }), h('td', { colspan: '5' }));
  }
  const cell = (kind, title) => h('td', { class: kind, 'data-title': title });
  const split = h('div', { class: 'split', 'aria-hidden': 'true' }, TIMES.map(([name]) => h('span', { class: `time-${name}` })));
  return h(
    'tr',
    {},
    h('th', { scope: 'row' }, h('b'), h('small')),
    cell('', 'Device'), cell('number', 'Lanes'), cell('number', 'Tokens/s'),
    h('td', { class: 'times', 'data-title': 'Time' }, split, h('small')),
    cell('number', 'MFU'), cell('number wide-only', 'Cores'), cell('number wide-only', 'Memory'), cell('number wide-only', 'Network'),
  );
}

function showWorker(element, worker) {
  const [name, device, lanes, speed, times, mfu, cores, memory, net] = element.children;
  setText(name.firstElementChild, worker.name);
  setText(name.lastElementChild, worker.straggler ? `straggler: ${worker.straggler}` : `${worker.host}, process ${worker.pid}`);
  element.classList.toggle('straggler', Boolean(worker.straggler));
  setText(device, `${worker.device}, ${plural(worker.threads, 'thread')}`);
  setText(lanes, int(worker.lanes));
  setText(speed, human(worker.tokens_per_second));
  showTimes(times, worker.times);
  setText(mfu, percent(worker.mfu, 1));
  setText(cores, fixed(worker.cores, 1));
  setText(memory, bytes(worker.rss_bytes));
  const known = worker.sent_per_second !== null && worker.sent_per_second !== undefined;
  net.title = worker.line_bytes_per_second
    ? `Its line takes ${bytes(worker.line_bytes_per_second)}/s; ${fixed(worker.line_rtt_ms, 1)} ms there and back to the nearest worker`
    : '';
  setText(net, known ? `${bytes(worker.sent_per_second)}/s, ${bytes(worker.received_per_second)}/s` : '–');
}

function showTimes(cell, times) {
  const [split, text] = cell.children;
  split.hidden = !times;
  if (!times) return setText(text, 'not known yet');
  TIMES.forEach(([name], i) => split.children[i].style.setProperty('--share', `${100 * times[name]}%`));
  setText(text, TIMES.map(([name]) => `${name} ${percent(times[name])}`).join(' · '));
}

function showLost(element, entry, now) {
  const [name, when, why] = element.children;
  setText(name, entry.worker ?? '');
  setText(when, `lost ${ago(entry.time_ms, now)}`);
  setAttr(when, 'title', clock(entry.time_ms, now));
  const price = !Number.isFinite(entry.cost) ? '' : `, ${cost(entry.cost) || 'no delay'}`;
  setText(why, `${entry.text}${price}`);
}
