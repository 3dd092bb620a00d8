// The page of one run: puts the panels together and keeps them fed. What comes by the stream is shown at once; what the
// stream does not carry (checkpoints, the end of a run) is asked for again, at most once a second.

import { Actions } from './actions.js';
import { getRun } from './api.js';
import { Charts, validations } from './charts.js';
import { Checkpoints } from './checkpoints.js';
import { Classes } from './classes.js';
import { System } from './cluster.js';
import { h, toast } from './dom.js';
import { splitName } from './format.js';
import { Headline } from './headline.js';
import { RunHistory } from './history.js';
import { Samples } from './samples.js';
import { Spec } from './spec.js';
import { markers, Timeline } from './timeline.js';
import { Workers } from './workers.js';

/** Between two requests for the whole of a run. */
const AGAIN_MS = 1000;
/** Wait for the end of a zoom before more detail is asked for. */
const ZOOMED_MS = 150;
/** Entries that are kept of the timeline, as many as the coordinator gives. */
const KEPT = 1000;

/** A run's page. */
export class RunPage {
  #view = null;
  #step = null;
  #history;
  #again = 0;
  #zooming = 0;
  #drawing = 0;
  #gone = false;

  /** @param {Object} app @param {string} name */
  constructor(app, name) {
    this.app = app;
    this.runs = [name];
    this.name = name;
    this.#history = new RunHistory(name);
    this.headline = new Headline(name);
    this.actions = new Actions(this.headline.actions, () => this.#ask());
    this.charts = new Charts({
      id: 'run',
      fill: (kind, charts) => this.#fill(kind, charts),
      onZoom: (view) => this.#zoomed(view),
      toStep: (x) => this.#history.stepAt(x, this.charts.axis),
      toX: (step) => this.#history.xOf(step, this.charts.axis),
    });
    this.workers = new Workers();
    this.timeline = new Timeline((entry) => this.#point(entry));
    this.checkpoints = new Checkpoints();
    this.samples = new Samples();
    this.classes = new Classes();
    this.spec = new Spec();
    this.system = new System();
    this.element = h(
      'article',
      { class: 'run' },
      this.headline.element,
      this.charts.element,
      this.workers.element,
      h('div', { class: 'columns' }, this.timeline.element, this.checkpoints.element),
      this.samples.element,
      this.classes.element,
      this.spec.element,
      this.system.element,
    );
  }

  /** What the window is called. */
  title() {
    const info = this.#view?.info;
    if (!info) return this.name;
    const { steps } = info.spec.train;
    const part = info.status === 'running' && steps > 0 ? `${Math.floor((100 * info.step) / steps)} % ` : '';
    return `${part}${info.name}, ${info.status}`;
  }

  /** Whether it is shown as it is and will stay. */
  rests() {
    return this.#view !== null && !['queued', 'running'].includes(this.#view.info.status);
  }

  /** Asks for everything. */
  async open() {
    await Promise.all([this.#load(), this.#history.load()]);
    if (this.charts.view) this.#zoomed(this.charts.view);
    this.#draw();
  }

  async #load() {
    const view = await getRun(this.name);
    this.#view = view;
    const last = view.info.last_step;
    if (last && !(this.#step?.step > last.step && view.info.status === 'running')) this.#step = last;
    this.spec.update(view.info.spec, view.facts);
    this.#show();
  }

  /** Asks for the run again, soon and not too often. */
  #ask() {
    this.#again ||= setTimeout(async () => {
      this.#again = 0;
      if (this.#gone) return;
      try {
        await this.#load();
      } catch {
        // The stream is lost as well then, and its return asks again.
      }
    }, AGAIN_MS);
  }

  /** Something came by the stream. @param {string} kind @param {*} data */
  event(kind, data) {
    if (kind === 'cluster') return this.#show();
    if (kind === 'runs') return this.#summary(data.find((run) => run.name === this.name));
    if (kind === 'reload') return data.run === this.name && this.open().catch(() => {});
    if (!this.#view) return;
    if (kind === 'steps') this.#steps(data.filter((step) => step.run === this.name));
    if (kind === 'eval' && data.run === this.name) this.#evaluated(data);
    if (kind === 'sample' && data.run === this.name) this.#sampled(data);
    if (kind === 'timeline' && data.run === this.name) this.#happened(data.entry);
  }

  #summary(run) {
    const info = this.#view?.info;
    if (!run || !info) return;
    if (run.status !== info.status || run.error !== info.error) this.#ask();
    const { status, queue_place, error, step } = run;
    Object.assign(info, { status, queue_place, error, step: Math.max(step, this.#step?.step ?? 0) });
    this.#show();
  }

  #steps(steps) {
    if (steps.length === 0) return;
    this.#step = steps.at(-1);
    this.#view.info.step = this.#step.step;
    if (this.#history.append(steps)) this.#history.load().then(() => this.#draw(), () => {});
    this.#show();
    this.#draw();
  }

  #evaluated(found) {
    const { evals } = this.#view.info;
    const at = evals.findIndex((e) => e.step === found.step && e.split === found.split);
    if (at < 0) evals.push(found);
    else evals[at] = found;
    this.#show();
    this.#draw();
  }

  #sampled(sample) {
    const { samples } = this.#view;
    const at = samples.findIndex((s) => s.step === sample.step && s.index === sample.index);
    if (at < 0) samples.push(sample);
    else samples[at] = sample;
    this.samples.update(samples);
  }

  #happened(entry) {
    const { timeline } = this.#view;
    if (timeline.some((known) => known.id === entry.id)) return;
    timeline.push(entry);
    timeline.splice(0, timeline.length - KEPT);
    if (!['worker_lost', 'redone', 'note', 'anomaly'].includes(entry.kind)) this.#ask();
    this.#show();
    this.#draw();
  }

  /** Shows an event's place in the charts. */
  #point(entry) {
    this.charts.point(this.#history.xOf(entry.step, this.charts.axis));
    const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
    this.charts.element.scrollIntoView({ behavior: calm ? 'auto' : 'smooth', block: 'nearest' });
  }

  #zoomed(view) {
    clearTimeout(this.#zooming);
    if (view === null) {
      this.#history.whole();
      return this.#draw();
    }
    const [from, to] = view.map((x) => this.#history.stepAt(x, this.charts.axis));
    this.#zooming = setTimeout(async () => {
      try {
        await this.#history.zoom(Math.floor(from), Math.ceil(to));
      } catch (error) {
        toast(`More detail of the curves: ${error.message}`, 'bad');
      }
      this.#draw();
    }, ZOOMED_MS);
  }

  /** Every panel but the charts. */
  #show() {
    const view = this.#view;
    if (!view) return;
    const { cluster } = this.app;
    const now = this.app.now();
    this.headline.update(view, this.#step, this.#pace());
    this.actions.update(view.info);
    this.workers.update(cluster, view, now);
    this.timeline.update(view.timeline, now);
    this.checkpoints.update(view.info);
    this.samples.update(view.samples);
    this.classes.update(view.info.evals);
    this.system.update(cluster, now);
    this.app.retitle();
  }

  #pace() {
    const { info, eta_seconds: eta } = this.#view;
    const pace = this.#history.pace();
    const running = info.status === 'running' && pace && this.#step;
    if (!running) return { eta: info.status === 'running' ? eta : null, speed: null };
    const left = Math.max(0, info.spec.train.steps - this.#step.step);
    return { eta: left / pace.steps, speed: pace.tokens };
  }

  #draw() {
    if (this.#drawing || this.#gone) return;
    this.#drawing = requestAnimationFrame(() => {
      this.#drawing = 0;
      this.charts.update();
    });
  }

  #fill({ metric }, charts) {
    const { axis } = charts;
    const toX = (step) => this.#history.xOf(step, axis);
    const curve = charts.smooth(this.#history.curve(metric, axis), metric === 'loss' ? 'training' : 'step', 0);
    const view = this.#view;
    if (!view) return { series: [] };
    const marks = markers(view.timeline, toX);
    if (metric !== 'loss') return { series: [curve], markers: marks };
    const look = (split) => ({ name: splitName(split), tone: split === 'validation' ? 1 : 2 });
    return { series: [curve, ...validations(view.info.evals, toX, look)], markers: marks, lines: baselines(view.facts.baselines) };
  }

  /** Reads the page's colours again. */
  recolor() {
    this.charts.recolor();
  }

  /** The page is left. */
  dispose() {
    this.#gone = true;
    clearTimeout(this.#again);
    clearTimeout(this.#zooming);
  }
}

/** What a model that has learned little or nothing would score, as lines. */
function baselines(known) {
  if (!known) return [];
  const lines = [];
  if (Number.isFinite(known.uniform)) lines.push({ y: known.uniform, name: 'at random' });
  if (Number.isFinite(known.unigram)) lines.push({ y: known.unigram, name: 'unigram' });
  if (known.ngram) lines.push({ y: known.ngram.loss, name: `${known.ngram.order}-gram` });
  return lines;
}
