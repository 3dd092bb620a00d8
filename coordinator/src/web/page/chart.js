// A line chart: curves with a band from their lowest to their highest value, points, horizontal lines, and events marked
// on the first curve. It draws what it is given and asks its owner to zoom; it knows nothing of runs.
//
// Mouse: drag to zoom, double-click to see all, ctrl and wheel (or two fingers on a touch pad) to zoom. Keys: arrows move
// the cross-hair, shift makes them faster, + and - zoom, Home and End go to the ends, Esc shows all.

import { h, setText, setAttr } from './dom.js';
import { nearest, within } from './lookup.js';
import { Plot, extent, palette } from './plot.js';
import { AXES } from './scale.js';

/** Pixels from which a press is a drag. */
const DRAG = 6;

/**
 * @typedef {Object} Series
 * @property {string} name
 * @property {number} tone which of the palette's colours
 * @property {ArrayLike<number>} x ascending
 * @property {ArrayLike<number|null>} y
 * @property {ArrayLike<number|null>|null} [low] the band's edges
 * @property {ArrayLike<number|null>|null} [high]
 * @property {ArrayLike<number|null>|null} [raw] what was smoothed; drawn pale
 * @property {boolean} [points] points joined by a thin dashed line: values that are known at some places only
 */

/** One chart. `element` goes into the page. */
export class Chart {
  #canvas = h('canvas', { 'aria-hidden': 'true' });
  #tip = h('div', { class: 'tip', hidden: true, 'aria-hidden': 'true' });
  #said = h('p', { class: 'hidden', 'aria-live': 'polite' });
  #frame = 0;
  #size = { width: 0, height: 0 };
  #colors = null;
  #drag = null;
  #cursor = null;
  #brief = false;
  #state;

  /**
   * @param {{title: string, format: (y: number) => string, small?: boolean, share?: boolean, onZoom?: (view: [number, number]|null) => void,
   *   onCursor?: (x: number|null) => void}} options
   */
  constructor({ title, format, small = false, share = false, onZoom = () => {}, onCursor = () => {} }) {
    this.title = title;
    this.onZoom = onZoom;
    this.onCursor = onCursor;
    this.#state = { series: [], lines: [], markers: [], view: null, axis: 'step', log: false, format, share };
    const kind = { role: 'application', 'aria-roledescription': 'line chart', tabindex: '0' };
    this.element = h('div', { class: small ? 'chart small' : 'chart', ...kind }, this.#canvas, this.#tip, this.#said);
    this.#listen();
    new ResizeObserver(() => this.#resize()).observe(this.element);
  }

  /**
   * Gives it what to draw.
   * @param {{series: Series[], lines?: {y: number, name: string}[], markers?: {x: number, text: string, tone: string}[]}} data
   */
  show({ series, lines = [], markers = [] }) {
    this.#change({ series, lines, markers });
  }

  /** Chooses the axes. @param {'step'|'tokens'|'time'} axis @param {boolean} log */
  setAxes(axis, log) {
    this.#change({ axis, log });
  }

  /** Shows a part; `null` is everything. @param {[number, number]|null} view */
  setView(view) {
    this.#change({ view });
  }

  /** Puts the cross-hair somewhere. @param {number|null} x @param {boolean} brief whether only values are told, as the reader looks elsewhere */
  setCursor(x, brief = false) {
    this.#cursor = x;
    this.#brief = brief;
    this.redraw();
  }

  /** Reads the colours of the page again. */
  recolor() {
    this.#colors = null;
    this.redraw();
  }

  /** Draws soon, once, however often it is asked to. */
  redraw() {
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #change(part) {
    Object.assign(this.#state, part);
    this.redraw();
  }

  #plot() {
    return new Plot(this.#state, this.#size);
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    const ratio = window.devicePixelRatio || 1;
    this.#size = { width, height };
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    // At once: a canvas that was resized is empty.
    cancelAnimationFrame(this.#frame);
    this.#draw();
  }

  #draw() {
    this.#frame = 0;
    const { width, height } = this.#size;
    if (width < 80 || height < 50) return;
    this.#colors ??= palette(this.element);
    const g = this.#canvas.getContext('2d');
    const ratio = this.#canvas.width / width;
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    const plot = this.#plot();
    plot.draw(g, this.#colors);
    if (this.#drag?.moved) this.#drawDrag(g, plot);
    const x = this.#cursor;
    this.#tip.hidden = x === null || x < plot.x0 || x > plot.x1 || !plot.full;
    if (!this.#tip.hidden) {
      plot.drawCursor(g, this.#colors, x);
      this.#fillTip(plot, x);
    }
    this.#describe(plot);
  }

  #drawDrag(g, plot) {
    const [a, b] = [this.#drag.from, this.#drag.to].sort((m, n) => m - n);
    g.fillStyle = this.#colors.tones[0];
    g.globalAlpha = 0.15;
    g.fillRect(a, plot.top, b - a, plot.bottom - plot.top);
    g.globalAlpha = 1;
  }

  #where(x) {
    const axis = AXES[this.#state.axis];
    return `${axis.name} ${axis.label(x)}`;
  }

  #fillTip(plot, x) {
    const read = plot.read(x).filter(({ tone }) => tone !== null || !this.#brief);
    const nameless = this.#brief && read.length === 1;
    const rows = read.map(({ name, tone, value, more }) =>
      h('p', { class: tone === null ? 'event' : `tone-${tone}` }, h('span', {}, nameless ? '' : name), value && h('b', {}, this.#brief ? value : value + more)),
    );
    const head = this.#brief ? [] : [h('p', { class: 'where' }, this.#where(x))];
    this.#tip.replaceChildren(...head, ...rows);
    this.#tip.hidden = head.length + rows.length === 0;
    const [at, { offsetWidth: wide }] = [plot.px(x), this.#tip];
    const left = at > this.#size.width / 2 ? at - wide - 12 : at + 12;
    this.#tip.style.setProperty('--x', `${Math.max(0, Math.min(left, this.#size.width - wide))}px`);
  }

  /** The chart in words, for those who do not see it. */
  #describe(plot) {
    const last = plot.series.flatMap((s) => {
      const i = s.x.length - 1;
      return Number.isFinite(s.y[i]) ? [`${s.name} ${plot.format(s.y[i])} at ${this.#where(s.x[i])}`] : [];
    });
    setAttr(this.element, 'aria-label', `${this.title}: ${last.join(', ') || 'no steps yet'}`);
  }

  // --- hands

  #listen() {
    const on = (name, act, options) => this.element.addEventListener(name, act, options);
    on('pointerdown', (e) => this.#press(e));
    on('pointermove', (e) => this.#move(e));
    on('pointerup', () => this.#release());
    on('pointercancel', () => {
      this.#drag = null;
      this.redraw();
    });
    on('pointerleave', () => this.#point(null));
    on('blur', () => this.#point(null));
    on('dblclick', () => this.onZoom(null));
    const wheel = (e) => {
      if (!e.ctrlKey) return;
      e.preventDefault();
      this.#zoom(e.deltaY > 0 ? 1.25 : 0.8, this.#plot().at(e.offsetX));
    };
    on('wheel', wheel, { passive: false });
    on('keydown', (e) => this.#key(e));
  }

  #press(e) {
    if (e.button !== 0 || !extent(this.#state.series)) return;
    this.#drag = { from: e.offsetX, to: e.offsetX, moved: false };
    this.#canvas.setPointerCapture(e.pointerId);
  }

  #move(e) {
    const plot = this.#plot();
    if (this.#drag) {
      this.#drag.to = Math.max(plot.left, Math.min(e.offsetX, plot.right));
      this.#drag.moved ||= Math.abs(this.#drag.to - this.#drag.from) > DRAG;
    }
    this.#point(plot.snapped(plot.at(e.offsetX)));
  }

  #release() {
    const drag = this.#drag;
    this.#drag = null;
    if (!drag?.moved) return;
    const plot = this.#plot();
    this.onZoom([plot.at(drag.from), plot.at(drag.to)].sort((a, b) => a - b));
  }

  #point(x) {
    this.setCursor(x);
    this.onCursor(x);
  }

  #zoom(factor, middle) {
    const whole = extent(this.#state.series);
    if (!whole) return;
    const [a, b] = this.#state.view ?? whole;
    const next = [middle - (middle - a) * factor, middle + (b - middle) * factor];
    if (next[0] <= whole[0] && next[1] >= whole[1]) this.onZoom(null);
    else this.onZoom([Math.max(whole[0], next[0]), Math.min(whole[1], next[1])]);
  }

  #key(e) {
    const curve = this.#state.series.find((s) => !s.points && s.x.length > 0);
    if (!curve || e.altKey || e.metaKey || e.ctrlKey) return;
    const [a, b] = this.#state.view ?? extent(this.#state.series);
    const middle = this.#cursor ?? (a + b) / 2;
    if (e.key.startsWith('Arrow') || e.key === 'Home' || e.key === 'End') {
      if (!this.#walk(e, curve, a, b)) return;
    } else if (e.key === '+' || e.key === '=') this.#zoom(0.5, middle);
    else if (e.key === '-') this.#zoom(2, middle);
    else if (e.key === 'Escape') this.onZoom(null);
    else return;
    e.preventDefault();
  }

  /** Moves the cross-hair by a key, and the view with it; says what is there. */
  #walk(e, curve, a, b) {
    const last = curve.x.length - 1;
    const [from, to] = within(curve.x, a, b);
    const stride = Math.max(1, Math.round(((to - from) / 100) * (e.shiftKey ? 10 : 1)));
    const now = this.#cursor === null ? to - 1 : nearest(curve.x, this.#cursor);
    const place = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: last }[e.key];
    if (place === undefined) return false;
    const x = curve.x[Math.max(0, Math.min(last, place))];
    if (x < a || x > b) {
      const shift = x < a ? x - a : x - b;
      this.onZoom([a + shift, b + shift]);
    }
    this.#point(x);
    const values = this.#plot().read(x).map(({ name, value, more }) => `${name} ${value}${more}`);
    setText(this.#said, `${this.#where(x)}: ${values.join(', ')}`);
    return true;
  }
}
