// Charts that belong together: they share the axis, the zoom and the cross-hair, and the tools above them. Used by a run's
// page with one run, and by the comparison with several.

import { Chart } from './chart.js';
import { choice, h, setText } from './dom.js';
import { fixed, human, percent, power, short } from './format.js';
import { smoothed } from './history.js';

/** What can be drawn of a run's steps: the metric, its title, and how its values are written. */
export const KINDS = [
  { metric: 'loss', title: 'Loss', unit: 'nats per token', format: (y) => fixed(y) },
  { metric: 'grad_norm', title: 'Gradient norm', unit: 'before clipping', format: short },
  { metric: 'learning_rate', title: 'Learning rate', unit: '', format: power },
  { metric: 'tokens_per_second', title: 'Tokens per second', unit: 'all workers', format: human },
  { metric: 'mfu', title: 'MFU', unit: 'model FLOPs utilisation', format: (y) => percent(y, 1), share: true },
];

/** A group of charts. `fill` gives each chart its series; it is asked again whenever something has changed. */
export class Charts {
  axis = 'step';
  log = false;
  smoothing = 0;
  view = null;
  #charts = [];
  #weight = h('output', {}, 'off');
  #reset = h('button', { type: 'button', class: 'small', disabled: true, onclick: () => this.zoom(null) }, 'Whole run');

  /**
   * @param {{id: string, fill: (kind: Object, charts: Charts) => Object, onZoom: (view: [number, number]|null) => void,
   *   toStep: (x: number) => number, toX: (step: number) => number}} options `toStep` and `toX` keep the zoom when the axis changes
   */
  constructor({ id, fill, onZoom, toStep, toX }) {
    this.fill = fill;
    this.onZoom = onZoom;
    this.toStep = toStep;
    this.toX = toX;
    const [large, small] = [h('div'), h('div', { class: 'charts' })];
    for (const kind of KINDS) {
      const chart = new Chart({
        title: kind.title,
        format: kind.format,
        share: kind.share,
        small: kind.metric !== 'loss',
        onZoom: (view) => this.zoom(view),
        onCursor: (x) => this.#charts.forEach((other) => other.chart !== chart && other.chart.setCursor(x, true)),
      });
      const legend = h('ul', { class: 'legend' });
      const caption = h('figcaption', {}, h('strong', {}, kind.title), h('span', { class: 'muted' }, kind.unit), legend);
      const figure = h('figure', { class: kind.metric === 'loss' ? 'wide' : '' }, caption, chart.element);
      (kind.metric === 'loss' ? large : small).append(figure);
      this.#charts.push({ kind, chart, legend, figure });
    }
    this.element = h('section', { class: 'curves', 'aria-label': 'Charts' }, this.#tools(id), large, small);
  }

  #tools(id) {
    const redo = () => this.update();
    return h(
      'div',
      { class: 'tools' },
      choice(`${id}-axis`, 'Over', [['step', 'steps'], ['tokens', 'tokens'], ['time', 'time']], 'step', (axis) => this.#setAxis(axis)),
      choice(`${id}-scale`, 'Heights', [['linear', 'linear'], ['log', 'log']], 'linear', (scale) => {
        this.log = scale === 'log';
        redo();
      }),
      h(
        'label',
        { class: 'slider' },
        'Smoothing',
        h('input', {
          type: 'range', min: '0', max: '99', value: '0',
          oninput: (e) => {
            this.smoothing = Number(e.target.value) / 100;
            setText(this.#weight, this.smoothing > 0 ? this.smoothing.toFixed(2) : 'off');
            redo();
          },
        }),
        this.#weight,
      ),
      this.#reset,
      h('span', { class: 'hint' }, 'drag to zoom, double-click or Esc for all; arrows, + and − work too'),
    );
  }

  #setAxis(axis) {
    const steps = this.view?.map((x) => this.toStep(x));
    this.axis = axis;
    this.view = steps?.map((step) => this.toX(step)) ?? null;
    this.#charts.forEach(({ chart }) => {
      chart.setCursor(null);
      chart.setView(this.view);
    });
    this.update();
  }

  /** Shows a part of all charts; `null` is everything. @param {[number, number]|null} view */
  zoom(view) {
    this.view = view;
    this.#reset.disabled = view === null;
    this.#charts.forEach(({ chart }) => chart.setView(view));
    this.onZoom(view);
  }

  /** Puts the cross-hair of all charts on a place, and brings it into view. @param {number} x */
  point(x) {
    if (this.view && (x < this.view[0] || x > this.view[1])) {
      const half = (this.view[1] - this.view[0]) / 2;
      this.zoom([x - half, x + half]);
    }
    this.#charts.forEach(({ kind, chart }) => chart.setCursor(x, kind.metric !== 'loss'));
  }

  /** Draws what is known now. */
  update() {
    for (const { kind, chart, legend, figure } of this.#charts) {
      const data = this.fill(kind, this);
      // What is known of no step is not drawn at all.
      figure.hidden = kind.share === true && !data.series.some((s) => s.y.some(Number.isFinite));
      chart.setAxes(this.axis, this.log);
      chart.show(data);
      const names = data.series.map((s) => s.name);
      legend.hidden = names.length < 2;
      if (legend.dataset.names !== names.join('\n')) {
        legend.dataset.names = names.join('\n');
        legend.replaceChildren(...data.series.map((s) => h('li', { class: `tone-${s.tone} ${s.points ? 'dashed' : ''}` }, s.name)));
      }
    }
  }

  /** Reads the page's colours again. */
  recolor() {
    this.#charts.forEach(({ chart }) => chart.recolor());
  }

  /** A curve with the smoothing that the reader chose. @param {Object} curve @param {string} name @param {number} tone */
  smooth(curve, name, tone) {
    if (this.smoothing === 0) return { ...curve, name, tone };
    return { ...curve, name, tone, y: smoothed(curve.y, this.smoothing), raw: curve.low ? null : curve.y };
  }
}

/**
 * The validations of a run as points, a series for each split.
 * @param {Object[]} evals
 * @param {(step: number) => number} toX
 * @param {(split: string) => {name: string, tone: number}} look
 */
export function validations(evals, toX, look) {
  const splits = [...new Set(evals.map((e) => e.split))];
  return splits.map((split) => {
    const own = evals.filter((e) => e.split === split);
    return { ...look(split), points: true, x: own.map((e) => toX(e.step)), y: own.map((e) => e.loss) };
  });
}
