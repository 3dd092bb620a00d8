// Building and updating the document. All text goes in as text nodes; nothing here parses HTML. Updates touch only what
// has changed, so that focus, selection and scroll positions stay where the reader left them.

/**
 * An element. `on…` properties are listeners, `class` and other names are attributes; `null`, `undefined` and `false`
 * are left out. Children are nodes or text.
 * @param {string} tag
 * @param {Object<string, *>} [props]
 * @param {...(Node|string|number|null|undefined|false|Array)} children
 * @returns {HTMLElement}
 */
export function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : String(value));
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) add(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/**
 * Sets an element's text if it is another.
 * @param {Node} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Sets or removes an attribute if it is another.
 * @param {Element} element
 * @param {string} name
 * @param {string|null} value
 */
export function setAttr(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/**
 * Makes a parent's children one for each item, in order. Elements of items that were there before are kept, and moved
 * only where the order demands it.
 * @template T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T) => string|number} keyOf
 * @param {(item: T) => Element} create
 * @param {(element: Element, item: T) => void} [update]
 */
export function keyed(parent, items, keyOf, create, update) {
  const old = parent.cohortItems ?? new Map();
  const now = new Map();
  for (const item of items) now.set(keyOf(item), old.get(keyOf(item)) ?? null);
  for (const [key, element] of old) if (!now.has(key)) element.remove();
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = now.get(key);
    if (element === null) {
      element = create(item);
      now.set(key, element);
    }
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update?.(element, item);
  }
  parent.cohortItems = now;
}

/**
 * A panel of the page that can be folded; its state stays while its content changes.
 * @param {string} title
 * @param {{open?: boolean, id?: string}} options
 * @param {...(Node|string)} children
 * @returns {HTMLElement}
 */
export function panel(title, { open = true, id } = {}, ...children) {
  return h(
    'details',
    { class: 'panel', open, id },
    h('summary', {}, h('h2', {}, title), h('span', { class: 'note' })),
    h('div', { class: 'inside' }, children),
  );
}

/**
 * Sets the small text beside a panel's title.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function panelNote(element, text) {
  setText(element.querySelector('summary .note'), text);
}

/**
 * A table with a caption for those who cannot see it, inside a region that scrolls by itself.
 * @param {string} caption
 * @param {Array<[string, string]>} columns each column's title and class
 * @param {string} [kind] `stack` makes cards of its rows on a narrow screen; cells need a `data-title` then
 * @returns {{element: HTMLElement, body: HTMLElement, head: HTMLElement}}
 */
export function table(caption, columns, kind = '') {
  const body = h('tbody');
  const head = h('tr', {}, columns.map(([title, kind]) => h('th', { scope: 'col', class: kind }, title)));
  const element = h(
    'div',
    { class: `scroll ${kind}`, tabindex: '0', role: 'region', 'aria-label': caption },
    h('table', {}, h('caption', { class: 'hidden' }, caption), h('thead', {}, head), body),
  );
  return { element, body, head };
}

/**
 * A button that copies a text and says so.
 * @param {string} label
 * @param {string} text
 * @returns {HTMLElement}
 */
export function copyButton(label, text) {
  const button = h('button', { type: 'button', class: 'small', title: text }, label);
  button.addEventListener('click', async () => {
    const copied = await copy(text);
    setText(button, copied ? 'Copied' : 'Select and copy');
    if (!copied) prompt('Copy this:', text);
    setTimeout(() => setText(button, label), 1500);
  });
  return button;
}

/** Copies a text; browsers give the clipboard only to secure origins, so there is an older way as well. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h('textarea', { class: 'hidden', 'aria-hidden': 'true' }, text);
    document.body.append(area);
    area.select();
    const copied = document.execCommand('copy');
    area.remove();
    return copied;
  }
}

/**
 * A group of radio buttons drawn as one control.
 * @param {string} name
 * @param {string} legend
 * @param {Array<[string, string]>} options value and text
 * @param {string} chosen
 * @param {(value: string) => void} onchange
 * @returns {HTMLElement}
 */
export function choice(name, legend, options, chosen, onchange) {
  return h(
    'fieldset',
    { class: 'choice' },
    h('legend', {}, legend),
    options.map(([value, text]) =>
      h(
        'label',
        {},
        h('input', { type: 'radio', name, value, checked: value === chosen, onchange: () => onchange(value) }),
        h('span', {}, text),
      ),
    ),
  );
}

/**
 * Says something in a corner for some seconds.
 * @param {string} text
 * @param {'good'|'bad'} [tone]
 */
export function toast(text, tone = 'good') {
  const item = h('p', { class: `toast ${tone}` }, text);
  const close = h('button', { type: 'button', class: 'quiet', 'aria-label': 'Close', onclick: () => item.remove() }, '×');
  item.append(close);
  document.getElementById('toasts').append(item);
  if (tone === 'good') setTimeout(() => item.remove(), 6000);
}
