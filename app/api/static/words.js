// Numbers as people read them.

export function seconds(value) {
  if (value < 0.1) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return value < 10 ? `${value.toFixed(1)} s` : value < 90 ? `${Math.round(value)} s` : `${(value / 60).toFixed(1)} min`;
}

export function about(value) {
  return value ? `about ${seconds(value)}` : "";
}

export function exactly(value) {
  return `${value.toFixed(3)} s`;
}

export function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function some(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}
