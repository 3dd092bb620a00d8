// Requests to the coordinator: JSON in, JSON out. Only this host is ever asked.

/** An answer that is an error; its message is the coordinator's own. */
export class ApiError extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: 'same-origin', ...options });
  } catch {
    throw new ApiError(0, 'the coordinator does not answer');
  }
  if (response.status === 204) return null;
  const text = await response.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // Something between us and the coordinator answered.
  }
  if (!response.ok) throw new ApiError(response.status, body?.error ?? `the coordinator answered ${response.status}`);
  if (body === null) throw new ApiError(response.status, 'the coordinator sent something that is not JSON');
  return body;
}

const run = (name) => `/api/runs/${encodeURIComponent(name)}`;
const change = (method, body) => ({
  method,
  headers: { 'x-cohort': '1', ...(body === undefined ? {} : { 'content-type': 'application/json' }) },
  body: body === undefined ? undefined : JSON.stringify(body),
});

/** Whether a token is asked for, and whether this browser has given it. */
export const session = () => ask('/api/session');

/** Gives the token. @param {string} token */
export const signIn = (token) => ask('/api/session', change('POST', { token }));

/** Forgets the token. */
export const signOut = () => ask('/api/session', change('DELETE'));

/** A run with everything but its steps. @param {string} name */
export const getRun = (name) => ask(run(name));

/** All runs, in short. */
export const getRuns = () => ask('/api/runs');

/**
 * The history of a run's steps.
 * @param {string} name
 * @param {{from?: number, to?: number, points: number}} range
 */
export function getHistory(name, { from, to, points }) {
  const query = new URLSearchParams({ points });
  if (from !== undefined) query.set('from', from);
  if (to !== undefined) query.set('to', to);
  return ask(`${run(name)}/history?${query}`);
}

/**
 * Does something to a run.
 * @param {string} name
 * @param {'pause'|'resume'|'cancel'|'checkpoint'} verb
 */
export const act = (name, verb) => ask(`${run(name)}/${verb}`, change('POST'));
