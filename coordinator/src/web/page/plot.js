// One picture of a chart: where things lie, and how they are drawn on a canvas. It is made anew for each picture and
// changes nothing; `chart.js` keeps the state and listens.

import { around, between, lastAt, nearest, stretches, within } from './lookup.js';
import { AXES, linearTicks, logTicks, tickLabels } from './scale.js';

const PAD = { left: 54, right: 14, top: 12, bottom: 26 };
/** Pixels within which a marker counts as pointed at. */
const NEAR = 6;
/** Marked events that are read out at one place, at most. */
const READ = 4;

/** Whether a value can be drawn. @param {*} y */
const drawable = (y) => typeof y === 'number' && Number.isFinite(y);

/**
 * From the first to the last x of some series; `null` if they are empty.
 * @param {import('./chart.js').Series[]} series
 * @returns {[number, number]|null}
 */
export function extent(series) {
  const ends = series.filter((s) => s.x.length > 0).flatMap((s) => [s.x[0], s.x[s.x.length - 1]]);
  if (ends.length === 0) return null;
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  return low < high ? [low, high] : [low - 0.5, low + 0.5];
}

/** The page's colours, from its style sheet. @param {Element} element */
export function palette(element) {
  const style = getComputedStyle(element);
  const get = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    tones: Array.from({ length: 8 }, (_, i) => get(`tone-${i}`)),
    grid: get('line'), muted: get('muted'), text: get('text'), panel: get('panel'),
    good: get('good'), bad: get('bad'), warn: get('warn'), plain: get('muted'),
    font: `11px ${style.fontFamily}`,
  };
}

/** A picture of a chart's state (`series`, `lines`, `markers`, `view`, `axis`, `log`, `format`, `share`). */
export class Plot {
  /** @param {Object} state @param {{width: number, height: number}} size in CSS pixels */
  constructor(state, { width, height }) {
    Object.assign(this, state);
    this.full = extent(this.series);
    [this.x0, this.x1] = this.view ?? this.full ?? [0, 1];
    [this.y0, this.y1] = this.#heights();
    this.left = PAD.left;
    this.top = PAD.top;
    this.right = width - PAD.right;
    this.bottom = height - PAD.bottom;
  }

  /** The pixel of an x. @param {number} x */
  px(x) {
    return this.left + ((x - this.x0) / (this.x1 - this.x0)) * (this.right - this.left);
  }

  /** The pixel of a y. @param {number} y */
  py(y) {
    const { y0, y1 } = this;
    const up = this.log ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0);
    return this.bottom - up * (this.bottom - this.top);
  }

  /** The x of a pixel. @param {number} px */
  at(px) {
    return this.x0 + ((px - this.left) / (this.right - this.left)) * (this.x1 - this.x0);
  }

  /** The lowest and highest value to be seen, with a little air. */
  #heights() {
    let [low, high] = [Infinity, -Infinity];
    const meet = (y) => {
      if (!drawable(y) || (this.log && y <= 0)) return;
      low = Math.min(low, y);
      high = Math.max(high, y);
    };
    for (const s of this.series) {
      const [from, to] = within(s.x, this.x0, this.x1);
      for (let i = from; i < to; i += 1) [s.y[i], s.low?.[i], s.high?.[i]].forEach(meet);
    }
    if (low > high) return this.log ? [0.1, 1] : [0, 1];
    // Lines that would squeeze the curves to less than two thirds stay out of sight.
    for (const { y } of this.lines) {
      const whole = Math.max(high, y) - Math.min(low, y);
      if (high > low && high - low > 0.66 * whole) meet(y);
    }
    if (this.log) {
      const air = Math.max((high / low) ** 0.04, 1.01);
      return [low / air, high * air];
    }
    const air = high > low ? 0.05 * (high - low) : Math.max(Math.abs(high) * 0.05, 1e-9);
    return [low >= 0 && low - air < 0 ? 0 : low - air, high + air];
  }

  /** Draws all of it. @param {CanvasRenderingContext2D} g @param {Object} colors from {@link palette} */
  draw(g, colors) {
    const tone = (s) => colors.tones[s.tone % colors.tones.length];
    g.font = colors.font;
    this.#drawAxes(g, colors);
    g.save();
    g.beginPath();
    // Dots at the edges are not cut in half.
    g.rect(this.left - 4, this.top - 4, this.right - this.left + 8, this.bottom - this.top + 8);
    g.clip();
    for (const s of this.series) if (s.low && s.high) this.#drawBand(g, s, tone(s));
    for (const s of this.series) this.#drawSeries(g, s, tone(s));
    this.#drawLines(g, colors);
    this.#drawMarkers(g, colors);
    g.restore();
  }

  #drawAxes(g, { grid, muted, text }) {
    g.lineWidth = 1;
    g.strokeStyle = grid;
    g.fillStyle = muted;
    g.textBaseline = 'middle';
    g.textAlign = 'right';
    const rows = (this.log ? logTicks : linearTicks)(this.y0, this.y1, Math.max(2, Math.floor((this.bottom - this.top) / 36)));
    const labels = this.share ? tickLabels(rows.map((y) => 100 * y)).map((label) => `${label} %`) : tickLabels(rows);
    labels.forEach((label, i) => {
      const y = Math.round(this.py(rows[i])) + 0.5;
      line(g, this.left, y, this.right, y);
      g.fillText(label, this.left - 8, y);
    });
    const axis = AXES[this.axis];
    g.textBaseline = 'top';
    const columns = axis.ticks(this.x0, this.x1, Math.max(3, Math.floor((this.right - this.left) / 85)));
    axis.labels(columns).forEach((label, i) => {
      const x = Math.round(this.px(columns[i])) + 0.5;
      const late = x + g.measureText(label).width / 2 > this.right + PAD.right;
      g.textAlign = late ? 'right' : 'center';
      line(g, x, this.bottom, x, this.bottom + 4);
      g.fillText(label, late ? this.right + PAD.right : x, this.bottom + 8);
    });
    if (this.full) return;
    g.textAlign = 'center';
    g.fillStyle = text;
    g.fillText('no steps yet', (this.left + this.right) / 2, (this.top + this.bottom) / 2);
  }

  #drawBand(g, s, color) {
    const [from, to] = around(s.x, this.x0, this.x1);
    const floor = this.log ? this.y0 / 10 : -Infinity;
    g.fillStyle = color;
    g.globalAlpha = 0.2;
    for (const [a, b] of stretches(s.low, from, to)) {
      g.beginPath();
      for (let i = a; i < b; i += 1) g.lineTo(this.px(s.x[i]), this.py(Math.max(floor, s.high[i])));
      for (let i = b - 1; i >= a; i -= 1) g.lineTo(this.px(s.x[i]), this.py(Math.max(floor, s.low[i])));
      g.fill();
    }
    g.globalAlpha = 1;
  }

  #drawLines(g, { muted, panel }) {
    g.fillStyle = muted;
    g.textAlign = 'right';
    g.textBaseline = 'bottom';
    for (const { y, name } of this.lines) {
      const at = Math.round(this.py(y)) + 0.5;
      if (!(at > this.top && at < this.bottom)) continue;
      g.strokeStyle = muted;
      g.lineWidth = 1;
      g.setLineDash([2, 4]);
      line(g, this.left, at, this.right, at);
      g.setLineDash([]);
      // A rim in the ground's colour keeps the words readable on curves.
      g.strokeStyle = panel;
      g.lineWidth = 3;
      const words = `${name} ${this.format(y)}`;
      g.strokeText(words, this.right - 4, at - 2);
      g.fillText(words, this.right - 4, at - 2);
    }
  }

  #drawSeries(g, s, color) {
    const [from, to] = around(s.x, this.x0, this.x1);
    g.strokeStyle = color;
    g.fillStyle = color;
    g.lineJoin = 'round';
    if (s.raw) {
      g.globalAlpha = 0.3;
      this.#stroke(g, s, s.raw, from, to, 1);
      g.globalAlpha = 1;
    }
    if (s.points) g.setLineDash([4, 3]);
    this.#stroke(g, s, s.y, from, to, s.points ? 1.2 : 1.6);
    g.setLineDash([]);
    if (!s.points && to - from > 2) return;
    const size = to - from > 60 ? 1.8 : 3;
    for (let i = from; i < to; i += 1) if (drawable(s.y[i])) dot(g, this.px(s.x[i]), this.py(s.y[i]), size);
  }

  #stroke(g, s, values, from, to, width) {
    g.lineWidth = width;
    for (const [a, b] of stretches(values, from, to)) {
      g.beginPath();
      for (let i = a; i < b; i += 1) g.lineTo(this.px(s.x[i]), this.py(values[i]));
      g.stroke();
    }
  }

  #drawMarkers(g, colors) {
    const curve = this.series.find((s) => !s.points);
    g.lineWidth = 1;
    for (const marker of this.markers) {
      if (marker.x < this.x0 || marker.x > this.x1) continue;
      const x = Math.round(this.px(marker.x)) + 0.5;
      g.fillStyle = colors[marker.tone] ?? colors.muted;
      g.strokeStyle = g.fillStyle;
      if (marker.tone === 'bad') {
        g.globalAlpha = 0.4;
        line(g, x, this.top, x, this.bottom);
        g.globalAlpha = 1;
      }
      const size = marker.tone === 'bad' ? 5.5 : 4;
      const height = curve ? between(curve.x, curve.y, Math.max(curve.x[0], Math.min(marker.x, curve.x.at(-1)))) : null;
      diamond(g, x, drawable(height) && !(this.log && height <= 0) ? this.py(height) : this.bottom - 6, size, colors.panel);
    }
  }

  /** Draws the cross-hair with a dot on each curve. @param {CanvasRenderingContext2D} g @param {Object} colors @param {number} x */
  drawCursor(g, colors, x) {
    g.strokeStyle = colors.muted;
    g.lineWidth = 1;
    const at = Math.round(this.px(x)) + 0.5;
    line(g, at, this.top, at, this.bottom);
    for (const s of this.series) {
      const i = placeOf(s, x);
      if (i < 0 || !drawable(s.y[i]) || s.x[i] < this.x0) continue;
      g.fillStyle = colors.tones[s.tone % colors.tones.length];
      dot(g, this.px(s.x[i]), this.py(s.y[i]), 3.5);
    }
  }

  /**
   * What there is at an x: a row for each curve, then the events that are marked there.
   * @param {number} x
   * @returns {{name: string, tone: number|null, value: string, more: string}[]}
   */
  read(x) {
    const rows = this.series.flatMap((s) => {
      const i = placeOf(s, x);
      if (i < 0 || !drawable(s.y[i])) return [];
      const wide = s.low && s.high && drawable(s.low[i]) && s.high[i] > s.low[i];
      const band = wide ? ` (${this.format(s.low[i])} to ${this.format(s.high[i])})` : '';
      const where = s.points && s.x[i] !== x ? ` at ${AXES[this.axis].label(s.x[i])}` : '';
      return [{ name: s.name, tone: s.tone, value: this.format(s.y[i]), more: band + where }];
    });
    const reach = (NEAR / (this.right - this.left)) * (this.x1 - this.x0);
    const events = this.markers.filter((m) => Math.abs(m.x - x) <= reach).slice(0, READ);
    return [...rows, ...events.map((m) => ({ name: m.text, tone: null, value: '', more: '' }))];
  }

  /** The x of the nearest value of the first curve, so that what is read is a step and not something between two. */
  snapped(x) {
    const filled = this.series.filter((s) => s.x.length > 0);
    const s = filled.find((each) => !each.points) ?? filled[0];
    return s ? s.x[nearest(s.x, x)] : null;
  }
}

/** The place of a series that is read at `x`: the nearest of a curve, the last known of points. */
function placeOf(s, x) {
  if (s.points) return lastAt(s.x, x);
  const beyond = s.x.length === 0 || x > s.x[s.x.length - 1] || x < s.x[0];
  return beyond ? -1 : nearest(s.x, x);
}

function line(g, x0, y0, x1, y1) {
  g.beginPath();
  g.moveTo(x0, y0);
  g.lineTo(x1, y1);
  g.stroke();
}

function dot(g, x, y, radius) {
  g.beginPath();
  g.arc(x, y, radius, 0, 2 * Math.PI);
  g.fill();
}

function diamond(g, x, y, size, edge) {
  g.beginPath();
  g.moveTo(x, y - size);
  g.lineTo(x + size, y);
  g.lineTo(x, y + size);
  g.lineTo(x - size, y);
  g.closePath();
  g.fill();
  g.strokeStyle = edge;
  g.stroke();
}
