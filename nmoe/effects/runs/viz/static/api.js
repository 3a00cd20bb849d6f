// Asks the server, and holds both to one contract: reading a field that the contract lacks throws.
import { useEffect, useRef, useState } from "./vendor/preact-htm.mjs";

let contract = null;

export class ApiError extends Error {}

/** `value`, whose fields can be read by the names of the contract only. */
export function strict(type, value) {
  if (value === null || value === undefined || type === "") return value;
  if (Array.isArray(value)) return value.map((each) => strict(type, each));
  const fields = contract[type];
  if (!fields) throw new ApiError(`api: no class ${type} in the contract; reload the page`);
  for (const name of Object.keys(fields)) {
    if (!(name in value)) throw new ApiError(`api: ${type} has a field ${name}, got none; reload the page`);
  }
  const inner = {};
  for (const [name, kind] of Object.entries(fields)) inner[name] = kind === "" ? value[name] : strict(kind, value[name]);
  return new Proxy(inner, {
    get(target, name) {
      if (typeof name === "symbol" || name === "toJSON" || name === "then" || name in target) return target[name];
      throw new ApiError(`api: ${type} has the fields ${Object.keys(fields).join(", ")}, read was ${name}`);
    },
  });
}

/** Address of an answer; parameters that are null, "" or false are left out, lists are repeated. */
export function address(name, parameters) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) {
        query.append(key, each === true ? "1" : each);
      }
    }
  }
  return `/api/${name}?${query}`;
}

async function fetched(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new ApiError((body.problems ?? [`the server answered ${answer.status}`]).join("\n"));
  return body;
}

export async function ask(type, path) {
  const [told, body] = await Promise.all([contract ?? fetched("/api/contract"), fetched(path)]);
  contract = told;
  return strict(type, body);
}

/** Change something on the server; the answer, or an ApiError. */
export async function send(path, body) {
  return fetched(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
}

/**
 * The answer at `path`, asked again when `path` or `version` changes; the old one stays until the new one is there.
 * One request at a time: what changes meanwhile is asked for after it. `path` null asks nothing.
 */
export function useAnswer(type, path, version) {
  const [told, setTold] = useState({ data: null, problem: null, path: null });
  const running = useRef({ busy: false, waiting: null }).current;
  useEffect(() => {
    const want = { path, type };
    running.waiting = path === null ? null : want;
    if (path === null || running.busy) return;
    const work = async () => {
      running.busy = true;
      while (running.waiting) {
        const current = running.waiting;
        running.waiting = null;
        try {
          const data = await ask(current.type, current.path);
          setTold({ data, problem: null, path: current.path });
        } catch (error) {
          const gone = error instanceof ApiError;
          setTold((old) => ({
            data: gone ? null : old.data,
            problem: gone ? error.message : `the server does not answer (${error.message}); is nmoe viz running?`,
            path: current.path,
          }));
        }
      }
      running.busy = false;
    };
    work();
  }, [path, version]);
  return told;
}

/** Calls `listen` with what the server says grew; says whether the connection stands. */
export function watch(listen, connected) {
  const stream = new EventSource("/api/stream");
  stream.onopen = () => connected(true);
  stream.onerror = () => connected(false);
  stream.onmessage = (message) => listen(JSON.parse(message.data));
  return stream;
}
