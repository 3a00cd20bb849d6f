// What the page shows is in its address: a link opens the same picture.
const LISTS = ["run", "col", "closed", "axis", "brush"];

export function read() {
  const query = new URLSearchParams(location.search);
  const state = {};
  for (const key of query.keys()) state[key] = LISTS.includes(key) ? query.getAll(key) : query.get(key);
  return state;
}

/** The address of `state`, without what is empty. */
export function link(state) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) query.append(key, each);
    }
  }
  const text = query.toString();
  return text ? `/?${text}` : "/";
}

/** Show `state` in the address: as a new entry of the history when the view changes. */
export function write(state, isNew) {
  const path = link(state);
  if (path !== location.pathname + location.search) history[isNew ? "pushState" : "replaceState"](null, "", path);
}
