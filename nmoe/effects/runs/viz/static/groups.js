// Curves of runs as curves of groups.

/**
 * The mean of each group's members at each place, and their lowest and highest as a band.
 * curves   on one grid
 * key      curve -> name of its group
 * returns  lines of a chart, a group a line, in the order of the groups' names
 */
export function grouped(curves, key, smoothed) {
  const groups = new Map();
  for (const curve of curves) {
    const name = key(curve);
    groups.set(name, [...(groups.get(name) ?? []), filled(smoothed ? curve.smooth : curve.mean)]);
  }
  const names = [...groups.keys()].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  return names.map((name) => line(name, groups.get(name)));
}

function line(name, members) {
  const across = (pick) => members[0].map((_, place) => {
    const there = members.map((member) => member[place]).filter((value) => value !== null);
    return there.length ? pick(there) : null;
  });
  const values = across((there) => there.reduce((sum, value) => sum + value, 0) / there.length);
  const present = values.filter((value) => value !== null);
  return {
    name: `${name} (${members.length})`, values,
    low: across((there) => Math.min(...there)), high: across((there) => Math.max(...there)),
    min: present.length ? Math.min(...present) : null, max: present.length ? Math.max(...present) : null,
  };
}

/** Values with the places between two of them filled evenly: runs that log at other steps than others have gaps. */
function filled(values) {
  const out = [...values];
  let before = -1;
  values.forEach((value, place) => {
    if (value === null) return;
    for (let gap = before + 1; before >= 0 && gap < place; gap += 1) {
      out[gap] = values[before] + (value - values[before]) * ((gap - before) / (place - before));
    }
    before = place;
  });
  return out;
}
