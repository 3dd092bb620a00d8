// What a reader can do to a run: pause, resume, cancel, write a checkpoint. Each asks first, and says what will happen.

import { act } from './api.js';
import { h, setText, toast } from './dom.js';
import { int } from './format.js';

const UNDER_WAY = ['queued', 'running'];
const RESTS = ['paused', 'interrupted', 'failed', 'cancelled'];

const from = (info) => {
  const newest = info.checkpoints.at(-1);
  return newest ? `its newest checkpoint, of step ${int(newest.step)}` : 'the start, as it has no checkpoint yet';
};

const ACTIONS = {
  checkpoint: {
    label: 'Checkpoint',
    busy: 'Writing…',
    states: ['running'],
    title: (run) => `Write a checkpoint of ${run}?`,
    words: () => 'One worker writes the state between two steps, and training goes on meanwhile. The result of the run is the same with and without it.',
    done: (info) => `The checkpoint of step ${int(info.checkpoints.at(-1)?.step)} is written.`,
  },
  pause: {
    label: 'Pause',
    busy: 'Pausing…',
    states: UNDER_WAY,
    title: (run) => `Pause ${run}?`,
    words: (info) =>
      info.status === 'queued'
        ? 'It leaves the queue and rests until it is resumed.'
        : 'It finishes the step in flight, writes a checkpoint and rests. Its workers are free for the next run in the queue. Resuming goes on from this checkpoint, to the bit.',
    done: (info) => `${info.name} is paused at step ${int(info.step)}.`,
  },
  resume: {
    label: 'Resume',
    busy: 'Resuming…',
    states: RESTS,
    title: (run) => `Resume ${run}?`,
    words: (info) => `It goes on from ${from(info)}. Behind other runs it waits in the queue.`,
    done: (info) => `${info.name} is taken up again.`,
  },
  cancel: {
    label: 'Cancel',
    busy: 'Cancelling…',
    tone: 'bad',
    states: [...UNDER_WAY, 'paused', 'interrupted', 'failed'],
    title: (run) => `Cancel ${run}?`,
    words: (info) => `It ends now. Its checkpoints stay; whatever it trained since then is lost. What is left is ${from(info)}.`,
    done: (info) => `${info.name} is cancelled.`,
  },
};

/** The buttons of a run's page; only those that its status allows are there. */
export class Actions {
  #buttons = new Map();
  #busy = null;
  #info = null;

  /** @param {HTMLElement} place where the buttons go @param {(info: Object) => void} onDone */
  constructor(place, onDone) {
    this.onDone = onDone;
    for (const [verb, { label, tone }] of Object.entries(ACTIONS)) {
      const button = h('button', { type: 'button', class: tone ?? '', 'data-verb': verb, hidden: true, onclick: () => this.#ask(verb) }, label);
      this.#buttons.set(verb, button);
      place.append(button);
    }
  }

  /** Shows what can be done now. @param {Object} info */
  update(info) {
    this.#info = info;
    for (const [verb, button] of this.#buttons) {
      const action = ACTIONS[verb];
      button.hidden = !action.states.includes(info.status) && this.#busy !== verb;
      button.disabled = this.#busy !== null;
      setText(button, this.#busy === verb ? action.busy : action.label);
    }
  }

  async #ask(verb) {
    const action = ACTIONS[verb];
    const { name } = this.#info;
    const sure = await confirm({ title: action.title(name), words: action.words(this.#info), label: `${action.label} ${name}`, tone: action.tone });
    if (!sure) return;
    this.#busy = verb;
    this.update(this.#info);
    try {
      const info = await act(name, verb);
      toast(action.done(info));
      this.onDone(info);
    } catch (error) {
      toast(`${action.label}: ${error.message}`, 'bad');
    } finally {
      this.#busy = null;
      this.update(this.#info);
    }
  }
}

/** Asks; gives whether the reader is sure. */
function confirm({ title, words, label, tone }) {
  return new Promise((resolve) => {
    let sure = false;
    const dialog = h(
      'dialog',
      { 'aria-labelledby': 'dialog-title', 'aria-describedby': 'dialog-words' },
      h('h2', { id: 'dialog-title' }, title),
      h('p', { id: 'dialog-words' }, words),
      h(
        'div',
        { class: 'row end' },
        h('button', { type: 'button', class: 'quiet', onclick: () => dialog.close() }, 'Leave it as it is'),
        h('button', { type: 'button', id: 'dialog-yes', class: tone ?? 'main', onclick: () => {
          sure = true;
          dialog.close();
        } }, label),
      ),
    );
    dialog.addEventListener('close', () => {
      dialog.remove();
      resolve(sure);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
