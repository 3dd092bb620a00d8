// What the model wrote after the run's prompts, at two steps side by side.

import { h, keyed, panel, panelNote, setText } from './dom.js';
import { int, plural } from './format.js';

/** The panel of samples on a run's page. */
export class Samples {
  #left = h('select', { 'aria-label': 'Earlier step' });
  #right = h('select', { 'aria-label': 'Later step' });
  #body = h('tbody');
  #chosen = { left: null, right: null };
  #samples = [];

  constructor() {
    const pick = (side, select) => select.addEventListener('change', () => {
      this.#chosen[side] = select.value === 'auto' ? null : Number(select.value);
      this.#show();
    });
    pick('left', this.#left);
    pick('right', this.#right);
    const head = h('tr', {}, h('th', { scope: 'col' }, 'Prompt'), h('th', { scope: 'col' }, this.#left), h('th', { scope: 'col' }, this.#right));
    const whole = h('table', { class: 'samples' }, h('caption', { class: 'hidden' }, 'Samples of two steps'), h('thead', {}, head), this.#body);
    this.element = panel('Samples', { id: 'samples' }, whole);
    this.element.hidden = true;
  }

  /** @param {Object[]} samples */
  update(samples) {
    this.#samples = samples;
    this.element.hidden = samples.length === 0;
    if (samples.length > 0) this.#show();
  }

  #show() {
    const steps = [...new Set(this.#samples.map((s) => s.step))].sort((a, b) => a - b);
    const left = this.#chosen.left ?? steps[0];
    const right = this.#chosen.right ?? steps.at(-1);
    options(this.#left, steps, this.#chosen.left, `first: step ${int(steps[0])}`);
    options(this.#right, steps, this.#chosen.right, `newest: step ${int(steps.at(-1))}`);
    const prompts = new Map(this.#samples.map((s) => [s.index, s.prompt]));
    const at = (step, index) => this.#samples.findLast((s) => s.step === step && s.index === index)?.text;
    const rows = [...prompts].sort(([a], [b]) => a - b);
    keyed(this.#body, rows, ([index]) => index, () => h('tr', {}, h('th', { scope: 'row' }), h('td'), h('td')), (element, [index, prompt]) => {
      setText(element.children[0], prompt || `prompt ${index + 1}`);
      setText(element.children[1], at(left, index) ?? 'not sampled at this step');
      setText(element.children[2], at(right, index) ?? 'not sampled at this step');
    });
    panelNote(this.element, `${plural(prompts.size, 'prompt')} at ${plural(steps.length, 'step')}`);
  }
}

/** Makes a list of steps; the first choice moves with the run. */
function options(select, steps, chosen, auto) {
  const items = [['auto', auto], ...steps.map((step) => [String(step), `step ${int(step)}`])];
  keyed(select, items, ([value]) => value, ([value]) => h('option', { value }), (element, [, text]) => setText(element, text));
  const value = chosen === null ? 'auto' : String(chosen);
  if (select.value !== value) select.value = value;
}
