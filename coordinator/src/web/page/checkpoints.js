// The checkpoints of a run, each with the commands that use it, ready to be copied.

import { copyButton, h, keyed, panel, panelNote, table } from './dom.js';
import { bytes, fixed, int, plural } from './format.js';

/** The commands for a checkpoint, by what the run trained. */
function commands(info, step) {
  const name = `${info.name}@${step}`;
  const generate = ['generate', `cohort generate --from ${name} --prompt 'Once upon a time'`];
  const write = ['export', `cohort export ${name} ./${info.name}-${step}`];
  if (info.spec.lora) return [generate, ['merge', `cohort merge ${name} -o ./${info.name}-${step}`], write];
  if (info.spec.model.labels?.length > 0 || info.evals.some((e) => e.classes)) {
    return [['eval', `cohort eval --from ${name} --classify FILE.jsonl`], write];
  }
  return [generate, ['finetune', `cohort finetune --from ${name} --corpus PATH`], write];
}

/** The panel of checkpoints on a run's page. */
export class Checkpoints {
  #table = table('Checkpoints', [['Step', 'number'], ['Validation', 'number'], ['Size', 'number'], ['State hash', 'wide-only'], ['Copy the command', '']], 'stack');
  #none = h('p', { class: 'muted' }, 'None yet.');

  constructor() {
    this.element = panel('Checkpoints', { id: 'checkpoints' }, this.#none, this.#table.element);
  }

  /** @param {Object} info */
  update(info) {
    const rows = info.checkpoints.toReversed();
    const best = rows.reduce((low, c) => (c.val_loss !== null && (!low || c.val_loss < low.val_loss) ? c : low), null);
    keyed(
      this.#table.body, rows, (c) => `${c.step} ${c.state_hash}`, (c) => row(info, c),
      (element, c) => element.classList.toggle('best', c === best && rows.length > 1),
    );
    this.#none.hidden = rows.length > 0;
    this.#table.element.hidden = rows.length === 0;
    const size = rows.reduce((sum, c) => sum + c.bytes, 0);
    panelNote(this.element, rows.length > 0 ? `${plural(rows.length, 'checkpoint')}, ${bytes(size)}` : '');
  }
}

function row(info, checkpoint) {
  const { step, val_loss: loss, bytes: size, state_hash: hash, path } = checkpoint;
  return h(
    'tr',
    { title: path },
    h('th', { scope: 'row', class: 'number' }, int(step)),
    h('td', { class: 'number', 'data-title': 'Validation' }, fixed(loss)),
    h('td', { class: 'number', 'data-title': 'Size' }, bytes(size)),
    h('td', { class: 'wide-only mono', title: hash }, `${hash.slice(0, 12)}…`),
    h('td', { class: 'buttons' }, commands(info, step).map(([label, text]) => copyButton(label, text))),
  );
}
