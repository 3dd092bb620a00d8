// Asks for a token of the coordinator. The answer is a cookie that scripts cannot read; nothing is stored here.

import { signIn } from './api.js';
import { h, setText } from './dom.js';

/** The page of the sign-in. */
export class SignIn {
  runs = null;
  #token = h('input', { type: 'password', id: 'token', autocomplete: 'current-password', required: true, 'aria-describedby': 'token-error' });
  #error = h('p', { class: 'error', id: 'token-error', role: 'alert', hidden: true });
  #button = h('button', { type: 'submit', class: 'main' }, 'Sign in');

  /** @param {() => void} onDone */
  constructor(onDone) {
    this.onDone = onDone;
    const form = h(
      'form',
      { class: 'card signin' },
      h('h1', { tabindex: '-1' }, 'Sign in'),
      h('p', {}, 'This coordinator wants a token: one that ', h('code', {}, 'cohort token create'), ' printed, or else the content of the file that it was started with (', h('code', {}, '--token-file'), ').'),
      h('label', { for: 'token' }, 'Token'),
      this.#token, this.#error, this.#button,
    );
    form.addEventListener('submit', (e) => {
      e.preventDefault();
      this.#send();
    });
    this.element = h('article', {}, form);
  }

  async #send() {
    this.#button.disabled = true;
    this.#error.hidden = true;
    try {
      await signIn(this.#token.value.trim());
      this.onDone();
    } catch (error) {
      setText(this.#error, error.status === 401 && !/revoked|expired/.test(error.message) ? 'This is not the token.' : error.message);
      this.#error.hidden = false;
      this.#token.focus();
    } finally {
      this.#button.disabled = false;
    }
  }

  title() {
    return 'Sign in';
  }

  async open() {
    this.#token.focus();
  }

  rests() {
    return true;
  }

  event() {}
  recolor() {}
  dispose() {}
}
